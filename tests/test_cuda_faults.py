"""Faults seeded into copies of the CUDA kernels: the emulation has to catch every one.

A fault is a replacement of text. All of them are written into one copy of the kernels, each behind a condition that the
program is told when it starts: two programs are built, for float32 alone, with AddressSanitizer and with
ThreadSanitizer, not one for every fault. With a fault, a program runs the cases that reach it
(cuda_on_host/cases.cpp). Caught is what ends in an error of the emulator, a sanitizer's report, a wrong value, or other
bits than the kernels give as they are. Those pass the same runs.
"""

import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
from cuda_on_host.build import HERE, PROCESSES, ROOT, Builder, compiler, execute

pytestmark = pytest.mark.cuda_on_host

ADDRESS, THREAD = "address", "thread"
# Built and run in the least time: TSAN runs too long without optimization.
FLAGS = {ADDRESS: ("-O0", "-fno-sanitize=undefined", "-w"), THREAD: ("-w",)}

# --- The cases --------------------------------------------------------------------------------------------------------

# Shared memory of a block: that of an H200; room for one piece of a long row, so that two make a cluster; for none, so
# that it is streamed.
H200, TWO_PIECES, ONE_PIECE, NO_PIECE = 232448, 64 << 10, 48 << 10, 4 << 10
# Room for 3 stretches of columns, or for one backward.
FEW_STRETCHES = 32 << 10


def case(direction, rows, columns, axis=1, shift=0, shared=H200, cluster=16):
    """For cuda_on_host/cases.cpp."""
    return f"{direction},{rows},{columns},{axis},{shift},{shared},{cluster}"


# The smallest that reach every line: odd lengths, addresses within a word, more work than one multiprocessor takes at a
# time, chunks of several rows. Rows of whole, aligned words have kernels of their own: 8 and 4 rows at a time to groups
# of lanes, of which not all have a word, and 2 to a block.
GROUP = (case("forward", 205, 31), case("forward", 36, 99, shift=2))
WHOLE_GROUP = (case("forward", 205, 24), case("forward", 37, 96))
BLOCK = (case("forward", 9, 1501), case("forward", 3, 5003, shift=3))
WHOLE_BLOCK = (case("forward", 9, 1500),)
RESIDENT = (case("forward", 3, 9001, shared=ONE_PIECE), case("forward", 2, 9001, shift=3, shared=ONE_PIECE))
STREAMED = (case("forward", 5, 9001, shared=NO_PIECE),)
# 9 stretches and 2 pieces, the last not full: 3 slabs, a stretch to a block of a cluster of 16, or all to one.
COLUMNS = (case("forward", 520, 70, axis=0), case("forward", 520, 67, axis=0, shift=3))
COLUMNS_STREAMED = (case("forward", 520, 150, axis=0, shared=FEW_STRETCHES, cluster=1),)
BACKWARD_GROUP = (case("backward", 108, 99),)
WHOLE_BACKWARD_GROUP = (case("backward", 107, 24), case("backward", 107, 96))
BACKWARD_GROUP_SUMS = (case("backward", 4200, 33),)  # chunks of 17 rows, 2 or 3 to a group
BACKWARD_BLOCK = (case("dx", 24, 517),)
WHOLE_BACKWARD_BLOCK = (case("dx", 24, 516),)
BACKWARD_BLOCK_SUMS = (case("backward", 2100, 517),)  # chunks of 9 rows, of which 8 are summed first
BACKWARD_CLUSTER = (case("dx", 12, 4103),)
BACKWARD_SLABS = (case("dx", 5, 4103, cluster=1),)
BACKWARD_COLUMNS = (case("backward", 520, 70, axis=0), case("backward", 520, 67, axis=0, shift=3))
BACKWARD_COLUMNS_STREAMED = (case("backward", 520, 150, axis=0, shared=FEW_STRETCHES, cluster=1),)


def batch(direction, images, channels, length, shift=0, shared=H200, cluster=16):
    return case(f"batch{direction}", images, length, channels, shift, shared, cluster)


# Planes of 320 and 1303 elements: one segment and two, of which the last is short; 3 pieces, the last not full.
PLANES = (batch("forward", 2, 5, 320), batch("forward", 9, 3, 1303, shared=ONE_PIECE))
PLANES += (batch("forward", 9, 2, 1303, shift=3, shared=ONE_PIECE),)
PLANES_STREAMED = (batch("forward", 9, 3, 1303, shared=NO_PIECE),)
CHANNEL_COLUMNS = (batch("forward", 520, 70, 1), batch("forward", 20, 9, 49))
CHANNEL_COLUMNS += (batch("forward", 520, 150, 1, shared=FEW_STRETCHES, cluster=1),)
BACKWARD_PLANES = (batch("backward", 2, 5, 320), batch("backward", 9, 3, 1303, shared=TWO_PIECES))
BACKWARD_PLANES += (batch("backward", 9, 2, 1303, shift=3, shared=TWO_PIECES),)
BACKWARD_PLANES_STREAMED = (batch("backward", 9, 3, 1303, shared=NO_PIECE),)
FEW_WARPS = (batch("backward", 2, 5, 320, shared=NO_PIECE),)
BACKWARD_CHANNEL_COLUMNS = (batch("backward", 520, 70, 1), batch("backward", 20, 9, 49))
BACKWARD_CHANNEL_COLUMNS += (batch("backward", 520, 150, 1, shared=FEW_STRETCHES, cluster=1),)

# Without sums: more channels to a block of one warp than it has threads; three segments a run, of 8 warps; columns, on
# one multiprocessor more strips than blocks; folded ones.
POINTWISE_PLANES = (batch("inference", 1, 2100, 260), batch("inference", 9, 3, 2100, shift=3))
POINTWISE_PLANES += (batch("frozen", 9, 3, 1303),)
POINTWISE_COLUMNS = (batch("inference", 90, 1300, 1), batch("inference", 20, 90, 9, shift=3))
POINTWISE_COLUMNS += (batch("frozen", 90, 67, 1),)

# --- The faults -------------------------------------------------------------------------------------------------------


class Fault(NamedTuple):
    """In a file of cuda/, what `old` has between its quotes becomes `new`: an expression, or a statement left out.

    `old` with what is around the quotes stands there once; spaces and line ends are alike.
    """

    old: str
    new: str
    sanitizer: str
    caught: str  # what has to be reported: a regular expression
    cases: tuple


RACE = "data race"
OVERRUN = "heap-buffer-overflow"
WRONG = "wrong: "
BARRIER = "`device::sync_block();`"
CLUSTER_BARRIER = "`device::sync_cluster();`"
WARP_IS_THERE = "`place < static_cast<int>(blockDim.x) / 32` ?"

FAULTS = {
    "load.cuh": {
        "last word read whole": Fault(
            "if (`at + 16 <= bytes`) return device::load_words_streaming",
            "at < bytes",
            *(ADDRESS, OVERRUN, GROUP),
        ),
        "last word written whole": Fault(
            "if (`at + 16 <= bytes`) { device::store_words_streaming",
            "at < bytes",
            *(ADDRESS, OVERRUN, GROUP),
        ),
        "word beyond whole rows read": Fault(
            "if (`16 * (v * L + lane) < bytes`)", "16 * (v * L + lane) <= bytes", ADDRESS, OVERRUN, WHOLE_GROUP
        ),
        "one element beyond the tail read": Fault(
            "if (`at < bytes`) elements.value", "at <= bytes", ADDRESS, OVERRUN, GROUP
        ),
        "one element beyond the tail written": Fault(
            "if (`begin <= at && at < end`)", "begin <= at && at <= end", ADDRESS, OVERRUN, GROUP
        ),
        "last element not written": Fault(
            "store_edge<T>(run + at, 0, `bytes - at`, data[v]);",
            "bytes - at - 4",
            *(ADDRESS, WRONG, GROUP),
        ),
        "unaligned word read beyond the run": Fault(
            "`at >= shift && at - shift + 32 <= bytes`",
            "at >= shift && at - shift + 16 <= bytes",
            *(ADDRESS, OVERRUN, GROUP),
        ),
        "unaligned word read before the run": Fault(
            "`at >= shift && at - shift + 32 <= bytes`", "at - shift + 32 <= bytes", ADDRESS, "use-after-poison", GROUP
        ),
        "unaligned words joined the wrong way": Fault(
            "funnel(before, data[v], `16 - shift`)", "shift", ADDRESS, WRONG, GROUP
        ),
        "neighbour's word from the wrong lane": Fault(
            "(`lane + L - 1`) % L, L);", "lane + L - 2", ADDRESS, WRONG, GROUP
        ),
    },
    "reduce.cuh": {
        "mask of the whole warp for a part of it": Fault(
            "return `(device::kAllLanes >> (32 - L)) << (threadIdx.x % 32u / L * L)`;",
            "device::kAllLanes",
            *(ADDRESS, "exits, but thread|has exited| meets ", GROUP),
        ),
        "mask one lane short": Fault("(`32 - L`)) <<", "33 - L", ADDRESS, "not in it|not in mask", GROUP),
        "one step of the fold missing": Fault(
            "`offset < width`; offset *= 2", "offset < width / 2", ADDRESS, WRONG, WHOLE_GROUP
        ),
        "fold beyond the group": Fault(
            "`offset < width`; offset *= 2", "offset <= width", ADDRESS, "shuffle_xor by 8 within 8", GROUP
        ),
        "the half that a lane keeps given away": Fault(
            "given = `select(upper, held[2 * i], held[2 * i + 1])`;",
            "select(upper, held[2 * i + 1], held[2 * i])",
            *(ADDRESS, WRONG, WHOLE_GROUP),
        ),
        "another row's number picked": Fault(
            "select(`lane & offset`, held[2 * i + 1], held[2 * i])", "!(lane & offset)", ADDRESS, WRONG, WHOLE_GROUP
        ),
        "another row's number from its lane": Fault(
            "shuffle(device::kAllLanes, own, `r`, L);", "r ^ 1", ADDRESS, WRONG, WHOLE_GROUP
        ),
        "no barrier between the warps of a piece": Fault(BARRIER, "", THREAD, RACE, STREAMED),
        "no barrier between the warps of a row": Fault(BARRIER, "", THREAD, RACE, BLOCK),
        "no barrier between the warps of a slab": Fault(BARRIER, "", THREAD, RACE, BACKWARD_BLOCK),
        "warps of a piece that are not there": Fault(WARP_IS_THERE, "true", ADDRESS, WRONG, FEW_WARPS),
        "warps of a row that are not there": Fault(WARP_IS_THERE, "true", ADDRESS, WRONG, BLOCK),
        "warps of a slab that are not there": Fault(WARP_IS_THERE, "true", ADDRESS, WRONG, BACKWARD_BLOCK),
        "scratch of the first of two rows": Fault(
            "? `scratch[lane % R][place]`", "scratch[0][place]", ADDRESS, WRONG, WHOLE_BLOCK
        ),
    },
    "row_norm.cuh": {
        "tail counted in the moments": Fault("if (`left < E`) {", "left < 0", ADDRESS, WRONG, GROUP),
        "lanes without a word counted": Fault(
            "merge(sum, select(`kWhole && left_of_word <= 0`,", "false", ADDRESS, WRONG, WHOLE_GROUP
        ),
        "lanes without a word counted for the pivot": Fault(
            # near enough as a pivot, but another one than that of the same row at another address
            "merge(about_x0[r], select(`kWhole && left_of_word <= 0`,",
            "false",
            *(ADDRESS, "", WHOLE_GROUP),
        ),
        "row after the last one read": Fault(
            "`r * G < rows` ? bytes : 0, lane, words", "r * G <= rows", ADDRESS, OVERRUN, WHOLE_GROUP
        ),
        "row after the last one written": Fault(
            "`r * G < rows` ? bytes : 0, group_mask", "r * G <= rows", ADDRESS, OVERRUN, WHOLE_GROUP
        ),
        "statistics after the last row written": Fault(
            "if (lane < R && `lane * G < rows`)", "lane * G <= rows", ADDRESS, OVERRUN, WHOLE_GROUP
        ),
        "rows left out": Fault("base += `warps * (G * R)`)", "warps * (G * R) + 1", ADDRESS, WRONG, GROUP),
        "rows written by two blocks": Fault(
            "warps = `std::int64_t{gridDim.x} * (blockDim.x / 32)`;",
            "std::int64_t{gridDim.x} * (blockDim.x / 32) - 1",
            *(THREAD, RACE, GROUP),
        ),
        "scratch of the row before used again": Fault("`parity ^= 1;`", "", THREAD, RACE, BLOCK),
        "pivots of the warps not brought together": Fault(
            "shift = some ? `m.moments.pivot - origin` : 0.0", "0.0", ADDRESS, WRONG, BLOCK
        ),
        "every other pair of rows left out": Fault(
            "row += `std::int64_t{gridDim.x} * R`)", "std::int64_t{gridDim.x} * R + 1", ADDRESS, WRONG, WHOLE_BLOCK
        ),
        "second of two rows read where there is one": Fault(
            "`r < rows` ? bytes : 0, lane, words", "true", ADDRESS, OVERRUN, WHOLE_BLOCK
        ),
    },
    "norms.cu": {
        "any row taken for whole words": Fault("return `bits % kWord == 0`;", "true", ADDRESS, "aligned", GROUP),
    },
    "choose.cpp": {
        "row cut into shares that are too small": Fault(
            "`32 * ceil_div(words, 32 * block.warps)`", "32 * (words / (32 * block.warps))", ADDRESS, WRONG, BLOCK
        ),
        "last strip of columns left out": Fault(
            "choice.strips = `ceil_div(row_bytes, 32 * kWord)`",
            "row_bytes / (32 * kWord)",
            *(ADDRESS, WRONG, COLUMNS_STREAMED),
        ),
        "last piece of columns left out": Fault(
            "`ceil_div(plan.lines_per_statistic, kPieceRows)`",
            "plan.lines_per_statistic / kPieceRows",
            *(ADDRESS, WRONG, COLUMNS_STREAMED),
        ),
    },
    "row_norm_long.cuh": {
        "no wait for the copy": Fault(
            "`device::copy_wait<0>();`", "", ADDRESS, "wrong: |exits without waiting", RESIDENT
        ),
        "copies not committed": Fault("`device::copy_commit();`", "", ADDRESS, "wrong: |exits without", RESIDENT),
        "wait for all copies but the latest": Fault(
            "`device::copy_wait<0>()`;", "device::copy_wait<1>()", ADDRESS, "wrong: |exits without", RESIDENT
        ),
        "no barrier behind the copy": Fault(f"{BARRIER} Words data[1][V];", "", THREAD, RACE, RESIDENT[:1]),
        "no barrier before the pieces are folded": Fault(f"{BARRIER} if (warp < pieces)", "", THREAD, RACE, RESIDENT),
        "no barrier before the next row is copied": Fault(
            f"{BARRIER} // the image is read", "", THREAD, RACE, RESIDENT
        ),
        "no cluster barrier before the exchange": Fault(
            f"{CLUSTER_BARRIER} const Counted total",
            "",
            *(THREAD, "before the first sync_cluster", RESIDENT[:1]),
        ),
        "no cluster barrier behind the exchange": Fault(
            f"{CLUSTER_BARRIER} // the other blocks have read", "", THREAD, "data race|has exited", RESIDENT[:1]
        ),
        "last words copied whole": Fault("`bytes - at < 16 ? bytes - at : 16`", "16", ADDRESS, OVERRUN, RESIDENT),
        "unaligned first word copied whole": Fault("if (`at < 0`) {", "false", ADDRESS, "use-after-poison", RESIDENT),
        "image one piece too small": Fault(
            "static_cast<std::size_t>(`pieces_per_block`) * cuda::kPieceBytes",
            "pieces_per_block - 1",
            *(ADDRESS, OVERRUN, RESIDENT),
        ),
        "rows strided by blocks, not clusters": Fault("row += `clusters`)", "gridDim.x", ADDRESS, WRONG, RESIDENT),
        "moments of a piece not written": Fault(
            "if (`threadIdx.x == 0`) to[", "threadIdx.x == 0 && blockIdx.x != 1", ADDRESS, WRONG, STREAMED
        ),
        "scratch of the piece before used again": Fault("`*parity ^= 1;`", "", THREAD, RACE, STREAMED),
        "last piece not written": Fault("`left > 0`;", "left > 1", ADDRESS, WRONG, STREAMED),
    },
    "row_gradient.cuh": {
        "tail counted in the sums": Fault("if (!kWhole && `left < E`) {", "left < 0", ADDRESS, WRONG, BACKWARD_GROUP),
        "lanes without a word counted": Fault(
            "none = `kWhole && left <= 0`;", "false", ADDRESS, WRONG, WHOLE_BACKWARD_GROUP
        ),
        "rows of a chunk left out": Fault("base += `R * kGroups`)", "R * kGroups + 1", ADDRESS, WRONG, BACKWARD_GROUP),
        "row after the last one read": Fault(
            "`row < end` ? bytes : 0, lane, dy[r]", "row <= end", ADDRESS, f"{OVERRUN}|{WRONG}", WHOLE_BACKWARD_GROUP
        ),
        "row after the last one written": Fault(
            "`at < end` ? bytes : 0, group_mask", "at <= end", ADDRESS, f"{OVERRUN}|{WRONG}", WHOLE_BACKWARD_GROUP
        ),
        "statistics of the row after the last one read": Fault(
            "if (`own_row < end`)", "own_row <= end", ADDRESS, OVERRUN, WHOLE_BACKWARD_GROUP
        ),
        "no barrier before the groups are folded": Fault(f"{BARRIER} C* partial", "", THREAD, RACE, BACKWARD_GROUP),
        "no barrier before the next chunk": Fault(
            f"= static_cast<C>(total); }} {BARRIER}", "", THREAD, RACE, BACKWARD_GROUP
        ),
        "partial of the last column not written": Fault(
            "if (`column >= count`) continue;", "column >= count - 1", ADDRESS, WRONG, BACKWARD_GROUP
        ),
        "chunks left out of the fold": Fault(
            "each = `(a.chunks + kFoldRows - 1) / kFoldRows`",
            "a.chunks / kFoldRows",
            *(ADDRESS, WRONG, BACKWARD_GROUP),
        ),
        "no barrier in the fold of the chunks": Fault(f"{BARRIER} if (part == 0", "", THREAD, RACE, BACKWARD_GROUP),
        "no barrier before the next columns are folded": Fault(
            f"column, total); }} {BARRIER}", "", THREAD, RACE, BACKWARD_GROUP
        ),
        "scratch of the row before used again": Fault(
            "`parity ^= 1;` const GradientSums mine", "", THREAD, RACE, BACKWARD_BLOCK
        ),
        "row of a slab after the last one read": Fault(
            "bytes = `row < end ? run.bytes() : 0`;", "run.bytes()", ADDRESS, OVERRUN, WHOLE_BACKWARD_BLOCK
        ),
        "last rows not summed": Fault(
            "`recent.move_to(&sums);` if (a.partial == nullptr) continue; C*", "", ADDRESS, WRONG, BACKWARD_BLOCK_SUMS
        ),
        "last rows of a group not summed": Fault(
            "if (R != kTogether) `recent.move_to(&sums);`", "", ADDRESS, WRONG, BACKWARD_GROUP
        ),
        "rows of a group summed together as if they were whole": Fault(
            "++turn % `kTogether` == 0", "R", ADDRESS, "", BACKWARD_GROUP_SUMS
        ),
        "rows summed twice": Fault("} `reset();` }", "", ADDRESS, WRONG, BACKWARD_BLOCK_SUMS),
        "no cluster barrier before the slabs are folded": Fault(
            f"{CLUSTER_BARRIER} GradientSums of_row",
            "",
            *(THREAD, "before the first sync_cluster", BACKWARD_CLUSTER),
        ),
        "no cluster barrier at the end": Fault(
            f"{CLUSTER_BARRIER} // the other blocks",
            "",
            THREAD,
            "data race|has exited",
            BACKWARD_CLUSTER,
        ),
        "sums of a slab not written": Fault(
            "if (threadIdx.x == 0) static_cast<GradientSums*>(a.slab_sums)[`unit`] = sums;",
            "unit / 2 * 2",
            *(ADDRESS, WRONG, BACKWARD_SLABS),
        ),
    },
    "choose.hpp": {
        "room for two of three numbers a column": Fault(
            "`sets * columns * 24`", "sets * columns * 16", ADDRESS, OVERRUN, COLUMNS
        ),
    },
    "column_norm.cuh": {
        "no barrier before the warps of a piece are folded": Fault(
            f"{BARRIER} Counted total{{}};", "", THREAD, RACE, COLUMNS_STREAMED
        ),
        "no barrier behind the fold": Fault(f"{BARRIER} return total;", "", THREAD, RACE, COLUMNS_STREAMED),
        "one row too many": Fault(
            "const std::int64_t rest = `a.rows - first_row`;",
            "a.rows - first_row + 1",
            *(ADDRESS, OVERRUN, COLUMNS_STREAMED),
        ),
        "moments of a piece not written": Fault(
            "if (`mine`) moments[place] = m;",
            "mine && p.piece == 0",
            ADDRESS,
            WRONG,
            COLUMNS_STREAMED,
        ),
        "rows beyond the last one read": Fault(
            "if (`row + r < p.rows`) data[r][i]",
            "row + r <= p.rows",
            *(ADDRESS, OVERRUN, (case("forward", 519, 150, axis=0, shared=FEW_STRETCHES, cluster=1),)),
        ),
        "stretch of a piece left out": Fault(
            "`stretch < kColumnWarps`; ++stretch) total", "stretch < 7", ADDRESS, WRONG, COLUMNS
        ),
    },
    "column_resident.cuh": {
        "no wait for the copy": Fault(
            "`device::copy_wait<0>();` device::sync_block(); const auto collect",
            "",
            *(ADDRESS, "wrong: |exits without waiting", (case("forward", 520, 72, axis=0),)),
        ),
        "no barrier behind the copy": Fault(f"{BARRIER} const auto collect", "", THREAD, RACE, COLUMNS),
        "no cluster barrier before moments are folded": Fault(
            f"{CLUSTER_BARRIER} // the moments are there", "", THREAD, "before the first sync_cluster|race", COLUMNS
        ),
        "no cluster barrier before the normalizers are read": Fault(
            f"{CLUSTER_BARRIER} // the constants are there K k[kPerWord<T>]; load_constants(t, memory, k); for_parked",
            "",
            *(THREAD, "data race|has exited", COLUMNS),
        ),
        "constants to the block that has them": Fault(
            "`block < device::cluster_size()`; ++block", "block < 1", ADDRESS, WRONG, COLUMNS
        ),
        "moments of the first block only": Fault("`static_cast<unsigned>(block)`);", "0u", ADDRESS, WRONG, COLUMNS),
        "last stretch of a block left out": Fault(
            "`stretch < slab.stretches`;", "stretch < slab.stretches - 1", ADDRESS, WRONG, COLUMNS
        ),
        "last piece not folded": Fault("`width < pieces`) width", "width < pieces - 1", ADDRESS, WRONG, COLUMNS),
        "words beyond the columns written": Fault(
            "`more < 0 ? 0 : more < 16 * L ? more : 16 * L`;", "16 * L", ADDRESS, "wrong: |overflow|exits", COLUMNS
        ),
        "slabs counted in blocks, not clusters": Fault(
            "unit = `blockIdx.x / device::cluster_size()`;", "blockIdx.x", ADDRESS, "wrong|overflow", COLUMNS
        ),
        "no barrier behind the copy of a backward": Fault(
            f"{BARRIER} for_stretches", "", THREAD, RACE, BACKWARD_COLUMNS
        ),
        "no cluster barrier before sums are folded": Fault(
            f"{CLUSTER_BARRIER} // the sums are there",
            "",
            THREAD,
            "before the first sync_cluster|race",
            BACKWARD_COLUMNS,
        ),
        "no cluster barrier before the constants are read": Fault(
            f"{CLUSTER_BARRIER} // the constants are there K k[kPerWord<T>]; load_constants(t, memory, k); const bool",
            "",
            *(THREAD, "data race|has exited", BACKWARD_COLUMNS),
        ),
        "dy in the place of x": Fault(
            "park(t, dy_of(a), `memory.rows + memory.tensor_words`);",
            "memory.rows",
            *(ADDRESS, WRONG, BACKWARD_COLUMNS),
        ),
    },
    "pointwise.cuh": {
        "constants of other channels not read yet": Fault(
            f"{BARRIER} // the constants before are read", "", THREAD, RACE, POINTWISE_PLANES[:1]
        ),
        "no barrier before the constants of planes are read": Fault(
            f"{BARRIER} }} const K k = constants", "", THREAD, RACE, POINTWISE_PLANES
        ),
        "constants of the first channels only": Fault(
            "ready = `first + blockDim.x`;", "first + 100000", ADDRESS, "wrong: |overflow", POINTWISE_PLANES
        ),
        "channel of the last piece without constants": Fault(
            "if (`channel <= last`)", "channel < last", ADDRESS, WRONG, POINTWISE_PLANES
        ),
        "piece between two blocks left out": Fault(
            "begin = `units * blockIdx.x / gridDim.x`,",
            "units * blockIdx.x / gridDim.x + (blockIdx.x == 1)",
            *(ADDRESS, WRONG, POINTWISE_PLANES),
        ),
        "segments of the next run not begun": Fault(
            "if (`segment >= runs.segments`) {", "false", ADDRESS, "wrong: |overflow", POINTWISE_PLANES
        ),
        "no barrier before the constants of columns are read": Fault(
            f"{BARRIER} K k[E] = {{}};", "", THREAD, RACE, POINTWISE_COLUMNS
        ),
        "no barrier before the next constants": Fault(
            f"{BARRIER} // the constants are read", "", THREAD, RACE, POINTWISE_COLUMNS
        ),
        "constants of columns counted from the first": Fault(
            "constants[`statistic_of_column(mine, channels.fold) - first`]",
            "(statistic_of_column(mine, channels.fold) - first) / 2",
            *(ADDRESS, WRONG, POINTWISE_COLUMNS),
        ),
        "bias in a gradient": Fault(
            "input_gradient(dy, C(1), C(0), C(`0`), C(0), factor)",
            "1",
            *(ADDRESS, WRONG, POINTWISE_COLUMNS),
        ),
    },
    "column_launch.cuh": {
        "last slab left out": Fault(
            "slabs = `(args.columns + width - 1) / width`;",
            "args.columns / width",
            *(ADDRESS, WRONG, COLUMNS),
        ),
    },
    "column_gradient.cuh": {
        "no barrier before the warps of a piece are folded": Fault(
            f"{BARRIER} GradientSums total{{}};", "", THREAD, RACE, BACKWARD_COLUMNS_STREAMED
        ),
        "no barrier behind the fold": Fault(f"{BARRIER} return total;", "", THREAD, RACE, BACKWARD_COLUMNS_STREAMED),
        "scratch of warps without rows": Fault(
            "`if (rows_of_stretch(a.rows, p.piece * kColumnWarps + w) == 0) return GradientSums{};`",
            "",
            *(ADDRESS, WRONG, BACKWARD_COLUMNS_STREAMED),
        ),
        "slabs share their part of dweight": Fault(
            "`word / cuda::kSlabWords`)", "word / 32", ADDRESS, WRONG, BACKWARD_COLUMNS
        ),
        "part of dweight by the wrong lanes": Fault(
            "`threadIdx.x % cuda::kSlabWords == 0` &&", "threadIdx.x % 32 == 0", ADDRESS, WRONG, BACKWARD_COLUMNS
        ),
        "sums of a piece not written": Fault(
            "if (`static_cast<int>(threadIdx.x) < p.columns`) { static_cast<GradientSums*>",
            "static_cast<int>(threadIdx.x) < p.columns && p.piece == 0",
            *(ADDRESS, WRONG, BACKWARD_COLUMNS_STREAMED),
        ),
    },
    "channel.cuh": {
        "running statistics by every channel's warp but the last": Fault(
            "if (`a.running_mean == nullptr`) return;",
            "a.running_mean == nullptr || channel + 1 == a.count",
            *(ADDRESS, WRONG, CHANNEL_COLUMNS),
        ),
        "weight of the channel before": Fault(
            "a.parameters_as_compute, `channel`, Compute<T>(1)",
            "channel / 2",
            *(ADDRESS, WRONG, PLANES),
        ),
        "places of the channel left out": Fault(
            "fold_places(`places`, [&](std::int64_t i) { return moments[i]; });",
            "places - 1",
            *(ADDRESS, WRONG, CHANNEL_COLUMNS),
        ),
        "dbias not stored": Fault(
            "if (`first && a.dbias != nullptr`)", "false", ADDRESS, WRONG, BACKWARD_CHANNEL_COLUMNS
        ),
    },
    "plane_norm.cuh": {
        "segment of a run that is not there": Fault(
            "`run < runs.runs ? runs.length : 0`", "runs.length", ADDRESS, "wrong: |overflow", PLANES_STREAMED
        ),
        "no wait for the copy": Fault(
            "`device::copy_wait<0>();`", "", ADDRESS, "wrong: |exits without waiting", PLANES
        ),
        "no barrier behind the copy": Fault(
            "`device::sync_warp(device::kAllLanes);` Words data", "", THREAD, RACE, PLANES
        ),
        "no barrier before the slots are filled again": Fault(
            "`device::sync_warp(device::kAllLanes);` // the slots are read",
            "",
            *(THREAD, RACE, (batch("forward", 2, 20, 320, shift=3),)),
        ),
        "no barrier before the warps of a piece are folded": Fault(
            f"{BARRIER} for (int piece", "", THREAD, RACE, PLANES
        ),
        "no cluster barrier before the exchange": Fault(
            f"{CLUSTER_BARRIER} const M total", "", THREAD, "before the first sync_cluster|race", PLANES
        ),
        "no cluster barrier behind the exchange": Fault(
            f"{CLUSTER_BARRIER} // the other blocks have read", "", THREAD, "data race|has exited", PLANES
        ),
        "warps that are not there": Fault(
            "`place < warps ? shared.warps[piece][place] : M{}`",
            "shared.warps[piece][place]",
            *(ADDRESS, WRONG, PLANES),
        ),
        "slots that overlap": Fault(
            "place * (`runs.segment_words + cuda::kSlotSpare`)",
            "runs.segment_words - 8",
            *(THREAD, "data race|wrong", PLANES),
        ),
        "slots one piece short": Fault(
            "`tensors * choice.pieces_per_block * choice.warps`",
            "tensors * choice.pieces_per_block * (choice.warps - 1)",
            *(ADDRESS, "overflow", PLANES),
        ),
        "last piece not written": Fault(
            "`i < units`; i += gridDim.x", "i < units - 1", ADDRESS, WRONG, PLANES_STREAMED
        ),
        "statistics stored by a block that has another piece": Fault(
            "`std::int64_t{device::cluster_rank()} * runs.pieces_per_block`",
            "std::int64_t{device::cluster_rank()} * runs.pieces_per_block / 2",
            *(ADDRESS, WRONG, PLANES),
        ),
    },
    "plane_gradient.cuh": {
        "dy in the place of x": Fault(
            "`slot<M>(a.runs, piece, 1)`, lane, 32", "slot<M>(a.runs, piece)", ADDRESS, "wrong", BACKWARD_PLANES
        ),
        "no wait for the copy": Fault(
            "`device::copy_wait<0>();`", "", ADDRESS, "wrong: |exits without waiting", BACKWARD_PLANES
        ),
        "scratch of the piece before used again": Fault("`parity ^= 1;`", "", THREAD, RACE, BACKWARD_PLANES_STREAMED),
        "sums of a piece not written": Fault(
            "if (`threadIdx.x == 0`) static_cast<GradientSums*>",
            "threadIdx.x == 0 && piece == 0",
            *(ADDRESS, WRONG, BACKWARD_PLANES_STREAMED),
        ),
    },
    "operands.hpp": {
        "channels of a fold counted as columns": Fault(
            "a.fold = `args.plan.fold`;", "1", ADDRESS, "wrong: |overflow", BACKWARD_CHANNEL_COLUMNS
        ),
    },
    "batch_norm.cu": {
        "dbias in the place of dweight": Fault(
            "channels.dbias = `dbias.data()`;",
            "dweight.data()",
            ADDRESS,
            WRONG,
            BACKWARD_CHANNEL_COLUMNS,
        ),
        "running statistics not given": Fault(
            "`channels.running_mean = running_mean.data();`", "", ADDRESS, WRONG, CHANNEL_COLUMNS
        ),
    },
}
ALL = {(file, name): fault for file, faults in FAULTS.items() for name, fault in faults.items()}
NUMBER = {key: 1 + place for place, key in enumerate(ALL)}

# --- Building and running ---------------------------------------------------------------------------------------------


def find(text, wanted):
    """Where `wanted`, or the group of it between quotes, stands in the text, once."""
    pattern = "".join(r"\s+" if part.isspace() else re.escape(part) for part in re.split(r"(\s+)", wanted))
    found = list(re.finditer(re.sub("`(.*)`", r"(\1)", pattern), text))
    assert len(found) == 1, f"{len(found)} times: {wanted}"
    return found[0].span("`" in wanted)


def replaced(path, old, new):
    """Replace what stands once in a file."""
    text = path.read_text()
    begin, end = find(text, old)
    path.write_text(text[:begin] + new + text[end:])


def seeded(text, faults):
    """The text of a file with {number: fault}; one is there while the variable `seeded_fault` has its number."""
    insertions = []
    for number, fault in faults.items():
        begin, end = find(text, fault.old)
        if text[end - 1] == ";":
            assert not fault.new
            opening, closing = f"if (seeded_fault != {number}) {{ ", " }"
        else:
            opening, closing = f"(seeded_fault == {number} ? ({fault.new}) : (", "))"
        # One fault may lie within another: what is opened last is closed first.
        insertions += [(begin, 1, -end, number, opening), (end, 0, -begin, -number, closing)]
    for place, *_, inserted in sorted(insertions, reverse=True):
        text = text[:place] + inserted + text[place:]
    return f"extern int seeded_fault;  {text}"  # no line more: reports name lines


def copy_of_sources(folder, sanitizer=None):
    """The kernels and what they include, for float32 alone: a quarter of the time. Small arrays have chunks of rows.

    With the faults that `sanitizer` is for.
    """
    for name in ("cuda", "cpp/core", "cpp/cpu"):
        shutil.copytree(ROOT / name, folder / name)
    for file, of_file in FAULTS.items():
        faults = {NUMBER[file, name]: fault for name, fault in of_file.items() if fault.sanitizer == sanitizer}
        path = folder / "cuda" / file
        path.write_text(seeded(path.read_text(), faults))
    for dtype in ("float16", "bfloat16", "float64"):
        for unit in folder.glob(f"cuda/*_{dtype}.cu"):
            unit.unlink()
        case = f"case DType::{dtype}: return f(TypeTag<{dtype.title().replace('Bf', 'BF')}>{{}});"
        replaced(folder / "cpp/core/dtype.hpp", "case DType::float64: break;" if dtype == "float64" else case, "")
    replaced(folder / "cpp/core/dtype.hpp", "} return f(TypeTag<double>{});", "default: return f(TypeTag<float>{}); }")
    replaced(folder / "cuda/choose.cpp", "kWantedChunks = 256;", "kWantedChunks = 12;")
    return folder


def program(folder, sanitizer, flags):
    """Of the kernels in a folder."""
    builder = Builder(folder, sanitizer, flags)
    return builder.program(HERE / "cases.cpp", *builder.kernels())


def execute_all(commands):
    """The completed process of each command, several at once."""
    with ThreadPoolExecutor(PROCESSES) as pool:
        return list(pool.map(lambda command: execute(*command), commands))


def cases_of(sanitizer):
    return sorted({case for fault in ALL.values() if fault.sanitizer == sanitizer for case in fault.cases})


@pytest.fixture(scope="module")
def tools():
    """What the tests of this file need."""
    if "LD_PRELOAD" in os.environ:
        pytest.skip("a sanitizer is in this process already")
    if compiler() is None:
        pytest.skip("no g++ here")


@pytest.fixture(scope="module")
def programs(tools, tmp_path_factory):
    """The two programs, by sanitizer."""
    return {s: program(copy_of_sources(tmp_path_factory.mktemp(s), s), s, FLAGS[s]) for s in FLAGS}


@pytest.fixture(scope="module")
def unchanged(programs):
    """What all cases do with no fault: by sanitizer, in the order of `cases_of`."""
    results = {s: execute_all([(programs[s], case) for case in cases_of(s)]) for s in FLAGS}
    if any("unexpected memory mapping" in done.stderr for done in results[THREAD]):
        pytest.skip("this TSAN cannot run with this kernel's address randomization")
    return results


@pytest.fixture(scope="module")
def outcomes(unchanged, programs, request):
    """What the faults do that this session asks for."""
    items = [item for item in request.session.items if "outcomes" in getattr(item, "fixturenames", ())]
    asked = [(item.callspec.params["file"], item.callspec.params["name"]) for item in items]
    commands = [(programs[ALL[key].sanitizer], f"fault={NUMBER[key]}", *ALL[key].cases) for key in asked]
    return dict(zip(asked, execute_all(commands), strict=True))


@pytest.mark.parametrize("sanitizer", [ADDRESS, THREAD])
def test_unchanged_kernels_pass(unchanged, sanitizer):
    for case, done in zip(cases_of(sanitizer), unchanged[sanitizer], strict=True):
        assert done.returncode == 0, done.stdout + done.stderr
        assert re.fullmatch(f"{case} [0-9a-f]{{16}}\n", done.stdout)
        assert not done.stderr


def test_unchanged_kernels_have_no_undefined_behaviour(unchanged, tmp_path):
    """And the bits of those that carry the faults, switched off."""
    carries_none = program(copy_of_sources(tmp_path), ADDRESS, ("-O0",))
    results = execute_all([(carries_none, case) for case in cases_of(ADDRESS)])
    for with_faults, done in zip(unchanged[ADDRESS], results, strict=True):
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout == with_faults.stdout


@pytest.mark.parametrize(("file", "name"), ALL)
def test_fault_is_caught(unchanged, outcomes, file, name):
    done, fault = outcomes[file, name], ALL[file, name]
    expected = {run.stdout.strip() for run in unchanged[fault.sanitizer]}
    other_bits = [line for line in done.stdout.splitlines() if line not in expected]
    assert done.returncode != 0 or other_bits, "not caught"
    assert re.search(fault.caught, done.stdout + done.stderr), done.stdout + done.stderr


def test_there_are_enough_faults():
    assert len(ALL) >= 20
