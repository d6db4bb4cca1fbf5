"""The emulation of CUDA on the CPU, by itself: small kernels (cuda_on_host/toys.cu), most of them with one mistake.

Every check of the emulator is seen to fire here, and to keep quiet on kernels that are right. What the sanitizers see
is theirs to report: "address" is AddressSanitizer with UndefinedBehaviorSanitizer, "thread" ThreadSanitizer.
"""

import inspect
import os
import re
import shutil

import cuda_on_host
import pytest
from cuda_on_host.build import HERE, Builder, compiler, execute

import lanenorm

pytestmark = pytest.mark.cuda_on_host

VARIANTS = ("", "address", "thread")
SCHEDULES = ("forward", "reversed")

# What these print, worked out by hand.
RIGHT = {
    # 32 ones, 0 + ... + 31 (then 32 + ... + 63), 32 times 100000
    "warp_sums": "3200528 3201552",
    # lanes 0, 1, 7 and 30: from lane 3; from lane 3 of 8; two further of 8; ^ 5; any; sum of the other half
    "shuffles": "3 3 3 3 | 3 3 3 27 | 2 3 7 30 | 5 4 2 27 | 1 1 1 1 | 376 376 376 120",
    "block_sums": "64 128 128 128",
    "warp_exchange": "1 0 3 2",
    "cluster_sums": "3 1003 7 1007",
    "cluster_of_one": "1 2 3 4",
    "copies": "11 13",
    "copies_of_others": "4 0 12 8",
    "by_value": "1 1 1 1 1 1 1 1 1",
    "words": "0 3 4 7",
    "after_an_error": "64 128 128 128",
    "workspace": "0 nan",
}

# The emulator's own errors: they come in every variant.
ERRORS = {
    "barrier_in_branch": r"thread 32, .* exits, but .* wait for it: sync_block at toys.cu:\d+",
    "barriers_of_two_branches": r"sync_block at toys.cu:(\d+) meets sync_block at toys.cu:(?!\1)\d+ \(block 0, ",
    "barrier_against_cluster": r"thread 5, .* sync_cluster at .* meets sync_block",
    "barrier_against_warp": r"thread 5, .* sync_warp at .* with mask 0xffffffff meets sync_block",
    "different_masks": r"thread 8, .* with mask 0xff00ffff meets sync_warp .* with mask 0xffffffff",
    "not_in_mask": r"thread 16, .* sync_warp at .* with mask 0x0000ffff by lane 16, not in it",
    "lanes_that_are_not_there": r"thread 32, .* names lanes 0xffff0000, which the block does not have",
    "exited_lane": r"thread 31, .* exits, but thread 0 waits for it: shuffle at",
    "source_not_in_mask": r"shuffle from lane 16, which is not in mask 0x0000ffff",
    "shuffle_against_vote": r"thread 1, .* shuffle at .* meets any at",
    "different_sizes": r"of 4 bytes meets shuffle at .* of 8 bytes",
    "width_not_a_power_of_two": r"shuffle with width 24, expected a power of two up to 32",
    "xor_beyond_width": r"shuffle_xor by 16 within 16 lanes",
    "ring": r"deadlock:\n  block 0, thread 0 waits in sync_warp at .* 0x00000003\n  .*\n  .* thread 2 ",
    "beyond_shared": r"shared memory of 4 bytes at offset 8, the launch gave 10",
    "unaligned_shared": r"shared memory at 0x[0-9a-f]*4, which is not 8-byte aligned",
    "copy_unaligned": r"copy_async_16 from 0x[0-9a-f]*4, which is not 16-byte aligned",
    "copy_to_unaligned": r"copy_async_16 to 0x[0-9a-f]*8, which is not 16-byte aligned",
    "unaligned_words": r"load_words 0x[0-9a-f]*4, which is not 16-byte aligned",
    "copies_without_last_wait": r"exits without waiting for copy_async_16 at toys.cu:\d+",
    "copies_without_commit": r"exits without waiting for copy_async_16 at toys.cu:\d+",
    "cluster_sums_without_first_barrier": r"of_block before the first sync_cluster: block 1 may not have started",
    "cluster_sums_without_last_barrier": r"of_block of block 1, which has exited",
    "not_in_shared": r"of_block of something that is not in this block's shared memory",
    "rank_beyond_cluster": r"of_block of block 2 of a cluster of 2",
    "empty_grid": r"launch with a grid of 0 blocks, expected 1 to 2\^31 - 1",
    "grid_too_large": r"launch with a grid of 2147483648 blocks",
    "empty_block": r"launch with blocks of 0 threads, expected 1 to 1024",
    "block_too_large": r"launch with blocks of 1025 threads",
    "shared_too_large": r"launch with 232449 bytes of shared memory a block, expected at most 232448",
    "empty_cluster": r"launch with clusters of 0 blocks",
    "cluster_too_large": r"launch with clusters of 16 blocks, expected at most 8",
    "cluster_before_sm_90": r"launch with clusters on architecture 89, expected 90 or more",
    "part_of_a_cluster": r"launch with a grid of 5 blocks, expected a multiple of the cluster size 2",
}

# What is wrong without being refused: the result without sanitizers, then who reports it.
WRONG = {
    "block_sums_without_first_barrier": (r"nan", "thread", r"data race .*toys.cu:\d+ in block_sums"),
    "block_sums_without_second_barrier": (r"96 128", "thread", r"data race .*toys.cu:\d+ in block_sums"),
    "copies_of_others_without_barrier": (r"4294967295 0 4294967295 8", "thread", r"data race .*copy_wait<0>"),
    "warp_exchange_without_sync": (r"1 0 3 2", "thread", r"data race .* in warp_exchange"),  # right by luck
    "same_element": (r"", "thread", r"data race .* in same_element"),
    "same_element_and_barrier": (r"", "thread", r"data race .* in same_element_and_barrier"),
    "pointer_to_exited_block": (r"1", "thread", r"data race"),
    "copies_without_first_wait": (r"4294967295 13", None, None),
    "shared_not_set": (r"nan nan nan nan", None, None),
    "shared_overrun": (None, "address", r"heap-buffer-overflow .* in shared_overrun"),
    "global_overrun": (None, "address", r"heap-buffer-overflow .*load_aligned"),
    "workspace_overrun": (None, "address", r"heap-buffer-overflow .* in workspace_overrun"),
}
OTHER = {"order", "largest_shape", "other_block_exits"}  # tested on their own


@pytest.fixture(scope="module")
def toys():
    """Runs one toy in one variant: what it printed, on one line and without the sign of NaN."""
    if "LD_PRELOAD" in os.environ:
        pytest.skip("a sanitizer is in this process already")
    if compiler() is None:
        pytest.skip("no g++ here")
    programs = {variant: Builder(sanitizer=variant, flags=("-g1",)).program(HERE / "toys.cu") for variant in VARIANTS}

    def run(name, variant="", schedule="forward"):
        done = execute(programs[variant], *([name, schedule] if name else []))
        if "unexpected memory mapping" in done.stderr:
            pytest.skip("this TSAN cannot run with this kernel's address randomization")
        return done.stdout.strip().replace("-nan", "nan").replace(" \n", " | "), done.stderr

    return run


def test_every_toy_is_tested(toys):
    assert set(toys("")[0].split()) == {*RIGHT, *ERRORS, *WRONG, *OTHER}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_right_kernels_compute_without_a_report(toys, variant, schedule):
    for name, expected in RIGHT.items():
        assert toys(name, variant, schedule) == (expected, ""), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_errors_name_block_thread_and_line(toys, variant):
    for name, expected in ERRORS.items():
        printed, reported = toys(name, variant)
        assert re.search(f"^error: cuda_on_host: .*{expected}", printed), f"{name}: {printed}"
        assert not reported, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_errors_do_not_depend_on_the_schedule(toys, variant):
    """Who comes first is another one, so the texts differ; that there is an error does not."""
    for name in ERRORS:
        assert toys(name, variant, "reversed")[0].startswith("error: cuda_on_host: "), name


@pytest.mark.parametrize("name", WRONG)
def test_undefined_results_show(toys, name):
    printed, variant, report = WRONG[name]
    if printed is not None:
        result, reported = toys(name)
        assert re.match(printed, result)
        assert not reported
    if variant is not None:
        assert re.search(f"SUMMARY: .*{report}", toys(name, variant)[1])


def test_shared_memory_ends_with_its_block(toys):
    """In the reversed schedule block 1 exits first. A pointer to its memory, taken before, then leads nowhere."""
    assert toys("other_block_exits", "", "forward")[0] == "1"
    assert "of_block of block 1, which has exited" in toys("other_block_exits", "", "reversed")[0]
    assert "data race" in toys("other_block_exits", "thread", "forward")[1]
    assert toys("pointer_to_exited_block", "", "reversed")[0] == "nan"
    assert re.search(
        "heap-use-after-free .* in other_block_exits", toys("pointer_to_exited_block", "address", "reversed")[1]
    )


def test_schedules_are_forward_and_reversed(toys):
    """The places in the queue of threads 0, 1 and 63 of block 0, and 0 and 63 of block 1. TSAN sees who else counts."""
    assert toys("order", "", "forward")[0] == "0 1 63 64 127"
    assert toys("order", "", "reversed")[0] == "127 126 64 63 0"
    assert "data race" in toys("order", "thread")[1]


@pytest.mark.parametrize("variant", ["", "address"])  # TSAN knows 8128 threads at most
def test_largest_shape_runs(toys, variant):
    assert toys("largest_shape", variant) == ("no error", "")


def test_other_processors_switch_with_ucontext(toys, tmp_path):
    """The switch for processors without one of their own, on this processor."""
    copy = shutil.copytree(HERE, tmp_path / "tests" / "cuda_on_host", ignore=shutil.ignore_patterns("__pycache__"))
    fibers = copy / "fibers.hpp"
    text = fibers.read_text()
    assert text.count("__x86_64__") == 2
    fibers.write_text(text.replace("__x86_64__", "__no_such_processor__"))
    for variant in VARIANTS:
        kernels = Builder(sanitizer=variant, flags=("-g1",)).compile(HERE / "toys.cu")
        builder = Builder(sanitizer=variant, emulator=copy)
        program = builder.link(".exe", [kernels, *builder.compile_all([])])
        for name in ("block_sums", "cluster_sums", "after_an_error"):
            done = execute(program, name)
            assert done.stdout.strip() == RIGHT[name], done.stderr


# --- The Python module ------------------------------------------------------------------------------------------------


def test_module_has_the_signatures_of_lanenorm():
    for name in ("layer_norm", "layer_norm_forward", "layer_norm_backward"):
        ours, theirs = (
            [(p.name, p.kind, p.default) for p in inspect.signature(getattr(module, name)).parameters.values()]
            for module in (cuda_on_host, lanenorm)
        )
        assert ours == theirs


def test_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="schedule is 'backwards', expected 'forward' or 'reversed'"):
        cuda_on_host.set_schedule("backwards")
