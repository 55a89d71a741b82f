"""Time and memory of the semi-hard triplet loss, forward and backward, in this package and in the other ways to do it.

    python benchmarks/mining_bench.py                        the table, in under two minutes on two cores
    python benchmarks/mining_bench.py --plot curve.png       and a plot of time and memory against N
    python benchmarks/mining_bench.py --cliff                no dimension and no class size falls off a cliff
    python benchmarks/mining_bench.py --memory               large batches: N = 32,768 and 100,000
    python benchmarks/mining_bench.py --rules                every rule of mining against semi-hard
    python benchmarks/mining_bench.py --references           a batch against the rows of earlier ones
    python benchmarks/mining_bench.py --device cuda          on a GPU: eager, CUDA graph, CUDA graph with a cold L2
    python benchmarks/mining_bench.py --markdown FILE.json   the README's table from a file that --json wrote

The yardstick is a bare X @ X.T into fresh memory, as a user would call it: the first line of every dense loss.
"""

import argparse
import functools
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

try:
    import facenet_ext
except ImportError as error:
    sys.exit(f"mining_bench: cannot import facenet_ext ({error}). Install it, from the checkout's root: pip install .")

import report
from batches import REGIMES, Size, make_batch
from contenders import CONTENDERS, DRAWN, PACKAGE, RULES, YARDSTICK
from probe import ProbeServer, available_bytes
from timing import modes, round_robin, summarise

SIZES = (
    Size(384, 16, 128),
    Size(1800, 40, 128),
    Size(4096, 16, 128),
    Size(8192, 16, 256),
)  # the first is where cubic ways fit
SWEEP = tuple(Size(n, 16, 128) for n in (256, 512, 1024, 2048, 4096, 8192, 16384))
LARGE = (Size(32768, 16, 128), Size(100_000, 16, 128))
LARGE_LIMIT = 150e6  # bytes above input and gradient at the first of LARGE
CLIFF_BASE = Size(4096, 16, 128)
CLIFF = (
    *(Size(4096, 16, d) for d in (96, 100, 200, 512)),
    *(Size(4096, k, 128) for k in (2, 3, 4, 8, 32, 64, 100, 200)),
)
CLIFF_LIMIT = 1.4  # times the base's ratio to its yardstick
RULES_SIZE = Size(1800, 40, 128)
RULES_CHECK = Size(256, 8, 64)  # small enough to be compared with the reference
RULE_LIMITS = {"hard": 1.0, "all": 2.0, "all_semi_hard": 2.0}  # times semi-hard in the same round
RULES_MEMORY = Size(32768, 16, 128), 200e6  # bytes above input and gradient
LIBRARY = Size(1024, 16, 128), 200.0  # pytorch-metric-learning takes at least so many times as long
REFERENCES = (128, 65536), (512, 65536)  # rows of the batch, rows of earlier ones
MOST_ROUNDS, LEAST_ROUNDS = 60, 11


class Bench:
    """Measures sizes and regimes, and decides what has to be left out so that the run ends in time.

    The package and the yardstick are called in every round. The rest share `budget` seconds: what has become too slow
    for its part is called once or twice and in the first regime only, what would take longer still is left out, and the
    table says so.
    """

    def __init__(self, server: ProbeServer, device: str, threads: int, seed: int, contenders: list, budget: float):
        self.server, self.device, self.threads, self.seed = server, device, threads, seed
        self.contenders, self.budget, self.deadline = contenders, budget, time.monotonic() + budget
        self.patience = budget / 35  # seconds for one contender in one size and regime
        self.last: dict[
            str, tuple[Size, float]
        ] = {}  # of each contender: the largest size done, seconds of a call there
        self.wrong: list[str] = []

    def say(self, text: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\033[K{text[:100]}", end="", file=sys.stderr, flush=True)

    def counter(self, title: str, rounds: int):
        turns = iter(range(1, rounds + 1))
        return lambda: self.say(f"{title}: round {next(turns)} of {rounds}")

    def reason_to_leave_out(self, contender, size: Size, first: bool) -> str:
        if missing := contender.missing():
            return missing
        need, available = (
            contender.memory(size),
            available_bytes() if self.device == "cpu" else torch.cuda.mem_get_info()[0],
        )
        if need > 0.9 * available:
            return f"needs about {report.show_bytes(need)}, {available / 1e9:.0f} GB are free"
        if contender.always or contender.name not in self.last:
            return ""
        before, seconds = self.last[contender.name]
        guess = seconds * contender.work(size) / contender.work(before)
        if guess > 2 * self.patience:
            return f"would take about {report.show_seconds(guess)} a call (--budget {18 * guess + 1:.0f} allows it)"
        if guess > self.patience / 2 and not first:
            return f"about {report.show_seconds(guess)} a call: first regime only (--budget {70 * guess + 1:.0f}: all)"
        if time.monotonic() + 2 * guess > self.deadline:
            return f"the {self.budget:.0f} s of --budget are used up"
        return ""

    def measure(self, size: Size, regime: str, first: bool = True) -> list[dict]:
        """One row for each contender and mode: times and ratios, or why it was left out; `first` regime of a size?"""
        x, y = make_batch(size, regime, self.seed, self.device)
        rows, calls, probed = [], {}, {}
        for contender in self.contenders:
            self.say(f"{size} {regime}: {contender.name}, memory and value")
            reason = self.reason_to_leave_out(contender, size, first)
            if not reason:
                found = self.server(contender.name, size, regime, self.seed, self.threads, limit=6 * self.patience)
                reason = found.get("error", "")
                if found.get("wrong"):
                    reason = f"computes something else: {found['wrong']}"
                    self.wrong.append(f"{contender.name} at {size} {regime} {reason}")
            row = {"size": list(size), "regime": regime, "name": contender.name}
            if reason:
                rows.append(row | {"left_out": reason})
                continue
            probed[contender.name] = row | {"peak_bytes": found["peak_bytes"]}
            self.last[contender.name] = (size, found["seconds"])
            calls[contender.name] = contender.bind(x, y)
        if YARDSTICK.name not in probed:
            return rows  # nothing to compare with; the rows say why
        for mode, (prepare, timer) in modes(self.device).items():
            rows += self.timed(mode, prepare, timer, calls, probed, f"{size} {regime} {mode}")
        order = [contender.name for contender in self.contenders]
        return sorted(rows, key=lambda row: order.index(row["name"]))  # what is left out keeps its place

    def timed(self, mode, prepare, timer, calls, probed, title) -> list[dict]:
        fast = {c.name for c in self.contenders if c.always}
        prepared, wanted, rows = {}, {}, []
        for name, call in calls.items():
            if mode != "eager" and name not in fast:
                continue  # pure PyTorch loops and nonzero() wait for the host: no graph can hold them
            prepared[name] = prepare(call)
            seconds = self.last[name][1]
            if name in fast or seconds < 0.5:
                prepared[name]()  # warm; of the slow ones the probe was call enough
                seconds = timer(prepared[name])
            wanted[name] = seconds
        own = sum(wanted[name] for name in fast if name in wanted)
        rounds = min(MOST_ROUNDS, max(LEAST_ROUNDS, int(self.patience / own)))
        wanted = {
            name: rounds
            if name in fast
            else min(rounds, max(2 - (seconds > self.patience), int(self.patience / 4 / seconds)))
            for name, seconds in wanted.items()
        }
        samples = round_robin(prepared, wanted, timer, self.counter(title, rounds))
        for name in prepared:
            size, probed_seconds = self.last[name]
            self.last[name] = (size, min(probed_seconds, *(seconds for _, seconds in samples[name])))
            rows.append(probed[name] | {"mode": mode} | summarise(samples[name], samples[YARDSTICK.name]))
        return rows

    def table(self, sizes: list[Size], regimes: list[str]) -> list[dict]:
        rows = []
        for size in sizes:
            of_size = [row for regime in regimes for row in self.measure(size, regime, first=regime == regimes[0])]
            self.say("")
            print(report.text_table(of_size), flush=True)
            rows += of_size
        return rows

    def cliff(self, regimes: list[str]) -> list[dict]:
        """Every configuration and the base once in each round, so that all ratios stand in the same weather."""
        rows = []
        prepare, timer = modes(self.device)["eager" if self.device == "cpu" else "graph"]
        for regime in regimes:
            calls = {}
            for size in (CLIFF_BASE, *CLIFF):
                x, y = make_batch(size, regime, self.seed, self.device)
                for contender in (YARDSTICK, PACKAGE):
                    calls[size, contender.name] = prepare(contender.bind(x, y))
            for call in calls.values():
                call()
            seconds = sum(timer(call) for call in calls.values())
            rounds = max(LEAST_ROUNDS, min(MOST_ROUNDS, int(8 * self.patience / seconds)))
            samples = round_robin(calls, dict.fromkeys(calls, rounds), timer, self.counter(regime, rounds))
            base = None
            for size in (CLIFF_BASE, *CLIFF):
                yardstick = samples[size, YARDSTICK.name]
                row = {"size": list(size), "regime": regime} | summarise(samples[size, PACKAGE.name], yardstick)
                base = base or row["ratio_in_round"]["median"]
                rows.append(row | {"over_base": row["ratio_in_round"]["median"] / base})
        self.say("")
        return rows

    def rules(self, regimes: list[str]) -> list[dict]:
        """Every rule, the yardstick and the default rule once in each round."""
        rows = []
        prepare, timer = modes(self.device)["eager" if self.device == "cpu" else "graph"]
        for regime in regimes:
            calls = {}
            for contender in (YARDSTICK, *RULES, DRAWN):
                found = self.server(contender.name, RULES_CHECK, regime, self.seed, self.threads)
                if found.get("error") or found.get("wrong"):
                    self.wrong.append(f"{contender.name} {regime}: {found.get('error') or found['wrong']}")
                calls[contender.name] = prepare(contender.bind(*make_batch(RULES_SIZE, regime, self.seed, self.device)))
                calls[contender.name]()
            samples = round_robin(
                calls, dict.fromkeys(calls, MOST_ROUNDS), timer, self.counter(f"rules {regime}", MOST_ROUNDS)
            )
            for name in calls:
                row = {"size": list(RULES_SIZE), "regime": regime, "name": name}
                over = summarise(samples[name], samples[RULES[0].name])["ratio_in_round"]
                rows.append(row | summarise(samples[name], samples[YARDSTICK.name]) | {"over_semi_hard": over})
        self.say("")
        return rows

    def references(self, regimes: list[str]) -> list[dict]:
        """A batch against earlier rows, which have no gradient: what they may serve as, and the product of both."""
        rows = []
        prepare, timer = modes(self.device)["eager" if self.device == "cpu" else "graph"]
        for regime in regimes:
            for n, m in REFERENCES:
                x, y = make_batch(Size(n + m, 16, 128), regime, self.seed, self.device)
                earlier = dict(reference_embeddings=x[n:].clone(), reference_labels=y[n:].clone())
                calls = {YARDSTICK.name: prepare(lambda x=x[:n], r=earlier["reference_embeddings"]: x @ r.T)}
                for which in ("negatives", "all", "only"):
                    loss = functools.partial(facenet_ext.triplet_loss, references=which, **earlier)
                    calls[which] = prepare(replace(PACKAGE, loss=loss).bind(x[:n], y[:n]))
                for call in calls.values():
                    call()
                rounds = dict.fromkeys(calls, 2 * LEAST_ROUNDS)
                samples = round_robin(calls, rounds, timer, self.counter(f"references {regime}", 2 * LEAST_ROUNDS))
                for name in calls:
                    row = {"size": [n, m, x.shape[1]], "regime": regime, "name": name}
                    rows.append(row | summarise(samples[name], samples[YARDSTICK.name]))
        self.say("")
        return rows

    def rules_memory(self) -> list[dict]:
        rows = []
        for contender in (*RULES, DRAWN):
            self.say(f"{contender.name}: memory")
            row = {"size": list(RULES_MEMORY[0]), "name": contender.name}
            rows.append(row | self.server(contender.name, RULES_MEMORY[0], REGIMES[0], self.seed, self.threads))
        self.say("")
        return rows

    def library(self) -> list[dict]:
        chosen = [c for c in CONTENDERS if c.name in (YARDSTICK.name, PACKAGE.name, "metric-learning")]
        bench = Bench(self.server, self.device, self.threads, self.seed, chosen, self.budget)
        rows = bench.measure(LIBRARY[0], REGIMES[0])
        self.wrong += bench.wrong
        self.say("")
        return rows

    def large(self, regime: str) -> list[dict]:
        rows = []
        for size in LARGE:
            self.say(f"{size} {regime}")
            found = self.server(PACKAGE.name, size, regime, self.seed, self.threads)
            rows.append({"size": list(size), "regime": regime, "name": PACKAGE.name} | found)
            self.say("")
            if "error" in found:
                print(f"{size} {regime}: {found['error']}", flush=True)
                continue
            limit = f", limit {report.show_bytes(LARGE_LIMIT)}: " + (
                "holds" if found["peak_bytes"] < LARGE_LIMIT else "EXCEEDED"
            )
            print(
                f"{size} {regime}: {report.show_seconds(found['seconds'])} forward and backward, peak "
                f"{report.show_bytes(found['peak_bytes'])} above input and gradient"
                f"{limit if size == LARGE[0] else ''}; "
                f"an N x N matrix alone would be {report.show_bytes(4 * size.n**2)}",
                flush=True,
            )
        return rows


def parse(arguments: list[str] | None) -> argparse.Namespace:
    names = [c.name for c in CONTENDERS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--sizes",
        help='such as "1800,40,128 4096,16,128": N,K,D each',
    )
    add("--regimes", default=",".join(REGIMES), help=f"of {','.join(REGIMES)} (all)")
    add("--only", help=f"contenders beside facenet_ext and the yardstick, of {','.join(names)}")
    add("--compile", action="store_true", help="also the compiled contender; compiling takes a minute or two")
    add("--device", default="cpu", help="cpu (default) or cuda")
    add("--threads", type=int, default=torch.get_num_threads(), help="on the CPU (all cores)")
    add("--budget", type=float, default=70.0, help="seconds that the slow contenders may take together (70)")
    add("--seed", type=int, default=0)
    add("--json", type=Path, metavar="FILE", help="write everything measured, and on what")
    add(
        "--plot", type=Path, metavar="FILE.png", help="measure a sweep over N as well and plot it (another two minutes)"
    )
    add("--cliff", action="store_true", help="instead of the table: dimensions and class sizes against the base")
    add("--memory", action="store_true", help="instead of the table: the peak at N = 32,768 and 100,000")
    add("--rules", action="store_true", help="instead of the table: every rule of mining, and the strongest library")
    add("--references", action="store_true", help="instead of the table: a batch against the rows of earlier ones")
    add("--markdown", type=Path, metavar="FILE.json", help="measure nothing: the README's table from a JSON file")
    args = parser.parse_args(arguments)

    if args.sizes is not None:
        try:
            args.sizes = [Size.parse(text) for text in args.sizes.split()]
        except ValueError as error:
            parser.error(f"--sizes: {error}")
    args.regimes = args.regimes.split(",")
    for regime in args.regimes:
        if regime not in REGIMES:
            parser.error(f"--regimes: got {regime!r}; expected some of {', '.join(REGIMES)}")
    args.contenders = [c for c in CONTENDERS if args.compile or not c.compile]
    if args.only is not None:
        chosen = [name.strip() for name in args.only.split(",")]
        for name in chosen:
            if name not in names:
                parser.error(f"--only: got {name!r}; expected some of {', '.join(names)}")
        args.contenders = [c for c in CONTENDERS if c.always or c.name in chosen]
    if args.device not in ("cpu", "cuda"):
        parser.error(f"--device: got {args.device!r}; expected cpu or cuda")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch finds no GPU here")
    if args.threads < 1:
        parser.error(f"--threads: got {args.threads}; expected at least 1")
    if args.budget <= 0:
        parser.error(f"--budget: got {args.budget}; expected seconds above 0")
    if args.plot and args.plot.suffix not in (".png", ".svg", ".pdf"):
        parser.error(f"--plot: got {str(args.plot)!r}; expected a file that ends in .png, .svg or .pdf")
    return args


def main(arguments: list[str] | None = None) -> int:
    try:
        args = parse(arguments)
        if args.markdown:
            print(report.markdown(report.read_json(args.markdown)))
            return 0
    except ValueError as error:
        print(f"mining_bench: {error}", file=sys.stderr)
        return 2
    if args.plot:
        try:
            from plot import plot  # before minutes are spent on measuring
        except ImportError as error:
            sys.exit(f"mining_bench: --plot needs matplotlib ({error}): pip install matplotlib")
    torch.set_num_threads(args.threads)
    data = {
        "benchmark": "mining_bench",
        "environment": report.environment(args.device, args.threads),
        "notes": {c.name: c.note for c in args.contenders},
        "rows": [],
    }
    print(f"{report.headline(data['environment'])}\n", flush=True)
    start = time.monotonic()
    with ProbeServer(args.device) as server:
        bench = Bench(server, args.device, args.threads, args.seed, args.contenders, args.budget)
        if args.cliff:
            data["cliff"] = bench.cliff(args.regimes)
            print(report.cliff_table(data["cliff"], CLIFF_LIMIT))
        if args.memory:
            data["memory"] = bench.large(args.regimes[0])
        if args.rules:
            data["rules"], data["library"] = bench.rules(args.regimes), bench.library()
            data["rules_memory"] = bench.rules_memory()
            print(report.rules_table(data, RULE_LIMITS, RULES_MEMORY[1], LIBRARY[1]))
        if args.references:
            data["references"] = bench.references(args.regimes)
            print(report.references_table(data["references"]))
        if not (args.cliff or args.memory or args.rules or args.references):
            print("Time of forward and backward, in brackets over the yardstick's: medians of interleaved calls.")
            print("Peak extra: memory above the input and its gradient.")
            print("".join(f"  {name}: {note}\n" for name, note in data["notes"].items() if note))
            data["rows"] = bench.table(args.sizes or SIZES, args.regimes)
        if args.plot:
            sweep = Bench(server, args.device, args.threads, args.seed, args.contenders, args.budget)
            data["sweep"] = [row for size in SWEEP for row in sweep.measure(size, args.regimes[0])]
            bench.wrong += sweep.wrong
            plot(args.plot, data["sweep"], data["environment"])
            print(f"plot: {args.plot}")
    data["seconds"] = round(time.monotonic() - start, 1)
    if args.json:
        report.write_json(args.json, data)
        print(f"json: {args.json}")
    for line in bench.wrong:
        print(f"mining_bench: {line}", file=sys.stderr)
    print(f"{data['seconds']:.0f} s")
    return 1 if bench.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
