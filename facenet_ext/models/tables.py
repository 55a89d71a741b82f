"""The networks, one table each, in the paper's own layout. A new network is a new table.

Each row carries its output shape at the table's input size; tests recompute all of them. Every layer of stride 2 halves
the map and rounds up (padding = kernel // 2).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Conv:
    name: str
    out: int
    kernel: int = 3
    stride: int = 1


@dataclass(frozen=True)
class Pool:  # max pool 3 x 3
    name: str
    stride: int = 2


@dataclass(frozen=True)
class Norm:  # local response normalisation
    name: str


@dataclass(frozen=True)
class Mix:  # an inception block; three, five = (reduce, out); pool = (kind, projection), 0: passed through
    name: str
    one: int
    three: tuple[int, int]
    five: tuple[int, int] | None
    pool: tuple[str, int] | None
    stride: int = 1


@dataclass(frozen=True)
class Max:  # fully connected, maxout of two pieces
    name: str
    out: int


@dataclass(frozen=True)
class Table:
    size: tuple[int, int]  # input height, width
    rows: tuple
    source: str


NN1 = Table((220, 220), (
    Conv("conv1", 64, 7, 2),                                              # 110 x 110 x 64
    Pool("pool1"),                                                        #  55 x  55 x 64
    Norm("norm1"),
    Conv("conv2a", 64, 1),                                                #  55 x  55 x 64
    Conv("conv2", 192),                                                   #  55 x  55 x 192
    Norm("norm2"),
    Pool("pool2"),                                                        #  28 x  28 x 192
    Conv("conv3a", 192, 1),                                               #  28 x  28 x 192
    Conv("conv3", 384),                                                   #  28 x  28 x 384
    Pool("pool3"),                                                        #  14 x  14 x 384
    Conv("conv4a", 384, 1),                                               #  14 x  14 x 384
    Conv("conv4", 256),                                                   #  14 x  14 x 256
    Conv("conv5a", 256, 1),                                               #  14 x  14 x 256
    Conv("conv5", 256),                                                   #  14 x  14 x 256
    Conv("conv6a", 256, 1),                                               #  14 x  14 x 256
    Conv("conv6", 256),                                                   #  14 x  14 x 256
    Pool("pool4"),                                                        #   7 x   7 x 256
    Max("fc1", 32 * 128),                                                 #          4096
    Max("fc2", 32 * 128),                                                 #          4096
), "paper, Table 1 (after Zeiler and Fergus)")

_STEM = (                                                                 # at 224 x 224      at 96 x 96
    Conv("conv1", 64, 7, 2),                                              # 112 x 112 x 64    48 x 48 x 64
    Pool("pool1"),                                                        #  56 x  56 x 64    24 x 24 x 64
    Norm("norm1"),
    Mix("2", 0, (64, 192), None, None),                                   #  56 x  56 x 192   24 x 24 x 192
    Norm("norm2"),
    Pool("pool2"),                                                        #  28 x  28 x 192   12 x 12 x 192
    #         1x1   3x3         5x5        pool
    Mix("3a", 64, (96, 128), (16, 32), ("max", 32)),                      #  28 x  28 x 256   12 x 12 x 256
    Mix("3b", 64, (96, 128), (32, 64), ("l2", 64)),                       #  28 x  28 x 320   12 x 12 x 320
    Mix("3c", 0, (128, 256), (32, 64), ("max", 0), stride=2),             #  14 x  14 x 640    6 x  6 x 640
    Mix("4a", 256, (96, 192), (32, 64), ("l2", 128)),                     #  14 x  14 x 640    6 x  6 x 640
)
_MIDDLE = (
    Mix("4b", 224, (112, 224), (32, 64), ("l2", 128)),                    #  14 x  14 x 640    6 x  6 x 640
    Mix("4c", 192, (128, 256), (32, 64), ("l2", 128)),                    #  14 x  14 x 640    6 x  6 x 640
    Mix("4d", 160, (144, 288), (32, 64), ("l2", 128)),                    #  14 x  14 x 640    6 x  6 x 640
)
_NN2_ROWS = _STEM + _MIDDLE + (
    Mix("4e", 0, (160, 256), (64, 128), ("max", 0), stride=2),            #   7 x   7 x 1024
    Mix("5a", 384, (192, 384), (48, 128), ("l2", 128)),                   #   7 x   7 x 1024
    Mix("5b", 384, (192, 384), (48, 128), ("max", 128)),                  #   7 x   7 x 1024
)
NN2 = Table((224, 224), _NN2_ROWS, "paper, Table 2")
NN3 = Table((160, 160), _NN2_ROWS, "paper: NN2 at 160 x 160; the last map is 5 x 5")
NN4 = Table((96, 96), _STEM + _MIDDLE + (
    Mix("4e", 0, (160, 256), None, ("max", 0), stride=2),                 #                    3 x  3 x 896
    Mix("5a", 384, (192, 384), None, ("l2", 128)),                        #                    3 x  3 x 896
    Mix("5b", 384, (192, 384), None, ("max", 128)),                       #                    3 x  3 x 896
), "paper: NN2 at 96 x 96 'without 5x5 convolutions in the higher layers'; dropped in 4e, 5a and 5b, the only choice "
   "that meets the printed parameters and multiply-adds")
NN4_SMALL2 = Table((96, 96), _STEM + (
    Mix("4e", 0, (160, 256), (64, 128), ("max", 0), stride=2),            #                    3 x  3 x 1024
    Mix("5a", 256, (96, 384), None, ("l2", 96)),                          #                    3 x  3 x 736
    Mix("5b", 256, (96, 384), None, ("max", 96)),                         #                    3 x  3 x 736
), "OpenFace's nn4.small2, for small data")

NNS1 = Table((165, 165), (
    Conv("conv1", 48, 5, 2),                                              #  83 x  83 x 48
    Pool("pool1"),                                                        #  42 x  42 x 48
    Norm("norm1"),
    Mix("2", 0, (32, 112), None, None),                                   #  42 x  42 x 112
    Norm("norm2"),
    Pool("pool2"),                                                        #  21 x  21 x 112
    Mix("3a", 64, (64, 112), (16, 32), ("max", 32)),                      #  21 x  21 x 240
    Mix("3c", 0, (64, 128), (16, 32), ("max", 0), stride=2),              #  11 x  11 x 400
    Mix("4a", 128, (64, 128), (16, 32), ("l2", 64)),                      #  11 x  11 x 400
    Mix("4e", 0, (80, 128), (16, 32), ("max", 0), stride=2),              #   6 x   6 x 512
    Mix("5a", 128, (96, 192), None, ("l2", 64)),                          #   6 x   6 x 384
    Max("fc1", 848),                                                      #             848
    Max("fc2", 848),                                                      #             848
), "ours: the paper prints only the budget, 26 M parameters and 220 M multiply-adds; inception blocks for the latter, "
   "fully connected maxout layers as in NN1 for the former")
NNS2 = Table((140, 116), (
    Conv("conv1", 12, 5, 2),                                              #  70 x  58 x 12
    Pool("pool1"),                                                        #  35 x  29 x 12
    Norm("norm1"),
    Mix("2", 0, (12, 32), None, None),                                    #  35 x  29 x 32
    Norm("norm2"),
    Pool("pool2"),                                                        #  18 x  15 x 32
    Mix("3a", 16, (16, 32), (8, 16), ("max", 16)),                        #  18 x  15 x 80
    Mix("3c", 0, (24, 48), (8, 16), ("max", 0), stride=2),                #   9 x   8 x 144
    Mix("4a", 48, (24, 48), (8, 16), ("l2", 32)),                         #   9 x   8 x 144
    Mix("4e", 0, (32, 64), None, ("max", 0), stride=2),                   #   5 x   4 x 208
    Mix("5a", 64, (48, 64), None, ("l2", 32)),                            #   5 x   4 x 160
    Max("fc1", 544),                                                      #             544
    Max("fc2", 544),                                                      #             544
), "ours: the paper prints only the budget, 4.3 M parameters and 20 M multiply-adds; as NNS1")
MINI = Table((48, 48), (
    Conv("conv1", 32, 3, 2),                                              #  24 x  24 x 32
    Conv("conv2", 64, 3, 2),                                              #  12 x  12 x 64
    Conv("conv3", 128),                                                   #  12 x  12 x 128
    Conv("conv4", 128, 3, 2),                                             #   6 x   6 x 128
    Conv("conv5", 256),                                                   #   6 x   6 x 256
    Conv("conv6", 256, 3, 2),                                             #   3 x   3 x 256
), "ours, for minutes of training on a CPU: plain 3x3 convolutions, on which a CPU reaches twice the multiply-adds per "
   "second of the inception blocks; also takes scikit-learn's digits")
