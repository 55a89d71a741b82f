// The few entry points of libgomp that the kernels use, once more, on std::thread. ThreadSanitizer does not see the futexes by
// which libgomp's threads wait for one another, and takes every parallel loop for a race; fork, join and loop counter below it
// sees. Only what g++ makes of "parallel for" with static and dynamic schedules and a reduction, as csrc/cpu has them; anything
// else fails to link.
#include <mutex>
#include <thread>
#include <vector>

namespace {

struct Team {  // one parallel region
  unsigned size;
  std::mutex mutex;
  bool begun = false;
  long next = 0, end = 0, step = 1, chunk = 1;  // of its dynamic loop
};
thread_local Team* team = nullptr;
thread_local unsigned number = 0;
std::mutex atomic_mutex;

bool take_chunk(long* begin, long* end) {
  const std::lock_guard<std::mutex> lock(team->mutex);
  if (team->next >= team->end) return false;
  *begin = team->next;
  team->next += team->chunk * team->step;
  *end = team->next < team->end ? team->next : team->end;
  return true;
}

}  // namespace

extern "C" {

int omp_get_thread_num() { return static_cast<int>(number); }
int omp_get_num_threads() { return team ? static_cast<int>(team->size) : 1; }

void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
  Team here{threads, {}};
  const auto member = [&](unsigned i) {
    team = &here;
    number = i;
    body(data);
    team = nullptr;
    number = 0;
  };
  std::vector<std::thread> others;
  for (unsigned i = 1; i < threads; ++i) others.emplace_back(member, i);
  member(0);
  for (std::thread& t : others) t.join();
}

bool GOMP_loop_nonmonotonic_dynamic_start(long start, long end, long step, long chunk, long* from, long* to) {
  {
    const std::lock_guard<std::mutex> lock(team->mutex);
    if (!team->begun) team->begun = true, team->next = start, team->end = end, team->step = step, team->chunk = chunk;
  }
  return take_chunk(from, to);
}
bool GOMP_loop_nonmonotonic_dynamic_next(long* from, long* to) { return take_chunk(from, to); }
void GOMP_loop_end_nowait() {}
void GOMP_atomic_start() { atomic_mutex.lock(); }
void GOMP_atomic_end() { atomic_mutex.unlock(); }
}
