"""Outputs come from a pool: reused, owned by their arrays, bounded, safe after fork."""

import os

import numpy as np
import pytest
from cases import at_byte

import lanenorm


@pytest.fixture
def pool():
    pool = lanenorm.get_default_memory_pool()
    limit = pool.get_limit()
    pool.set_limit(64 << 20)
    pool.free_all_blocks()
    yield pool
    pool.set_limit(limit)


def make(megabytes):
    return lanenorm.layer_norm(np.full((megabytes * 256, 1024), 7, np.float32))


@pytest.mark.parametrize(("rows", "pooled"), [(27, 0), (28, 128 << 10)])
def test_pool_has_outputs_of_112_kilobytes_and_more(pool, rows, pooled):
    used = pool.used_bytes()
    y = lanenorm.layer_norm(np.ones((rows, 1024), np.float32))
    assert pool.used_bytes() - used == pooled
    assert y.nbytes == rows * 4096


def test_pool_reuses_the_memory_of_a_dead_output(pool):
    used = pool.used_bytes()
    y = make(4)
    address = y.ctypes.data
    assert pool.used_bytes() - used == 4 << 20
    del y
    assert (pool.used_bytes(), pool.free_bytes(), pool.n_free_blocks()) == (used, 4 << 20, 1)
    again = make(4)
    assert again.ctypes.data // 4096 == address // 4096  # where in the page depends on x
    assert pool.free_bytes() == 0
    assert pool.total_bytes() == pool.used_bytes()


def test_pool_outputs_are_ordinary_arrays(pool):
    y = make(4)
    assert y.flags.owndata
    assert y.base is None
    assert y.ctypes.data % 64 == 0
    y[:] = 3
    y.resize((2048, 1024), refcheck=False)  # realloc
    assert np.all(y[:1024] == 3)
    assert np.all(y[1024:] == 0)
    y.resize((10, 1024), refcheck=False)
    assert np.all(y == 3)
    del y
    assert pool.free_bytes() > 0


def test_pool_memory_outlives_other_outputs(pool):
    outputs = [make(1) + i for i in range(5)]
    kept = [make(1) for _ in range(5)]
    for i, y in enumerate(kept):
        y[:] = i
    del outputs
    more = [make(1) for _ in range(5)]
    for y in more:
        y[:] = -1
    assert all(np.all(y == i) for i, y in enumerate(kept))


def test_pool_arrays_made_by_the_caller_do_not_come_from_it(pool):
    before = pool.used_bytes()
    y = make(4)
    used = pool.used_bytes()
    own = np.empty_like(y)
    assert pool.used_bytes() == used > before
    del own


def test_pool_small_outputs_do_not_come_from_it(pool):
    before = pool.used_bytes()
    y = lanenorm.layer_norm(np.ones((8, 64), np.float32))
    assert pool.used_bytes() == before
    del y


def test_pool_keeps_at_most_its_limit(pool):
    pool.set_limit(8 << 20)
    arrays = [make(4) for _ in range(4)]
    last = arrays[-1].ctypes.data // 4096
    while arrays:
        del arrays[0]
        assert pool.free_bytes() <= 8 << 20
    assert pool.n_free_blocks() == 2
    assert make(4).ctypes.data // 4096 == last  # what was freed last is used first
    pool.set_limit(0)
    assert pool.free_bytes() == 0
    del arrays
    y = make(4)
    del y
    assert pool.free_bytes() == 0


def test_pool_does_not_waste_a_large_block_on_a_small_output(pool):
    y = make(16)
    del y
    small = make(1)
    assert pool.free_bytes() == 16 << 20
    del small


def in_the_way(y, read, distance):
    """Whether y begins where stores to it hold up loads of an array whose rows are a multiple of `distance` apart."""
    behind = y.ctypes.data - read.ctypes.data + 64
    return behind % 4096 <= 384 or behind % distance <= 256


@pytest.mark.parametrize("offset", [0, 4, 16, 256, 448, 500, 960, 2000, 4032, 4092])
def test_pool_outputs_begin_away_from_what_is_read_meanwhile(pool, offset):
    """Within a page, and from the rows around it, whichever block they are in."""
    x = at_byte(np.ones((256, 256), np.float32), offset)
    outputs = [lanenorm.layer_norm(x) for _ in range(10)]
    assert not any(in_the_way(y, x, 512) for y in outputs)
    assert all(y.ctypes.data % 64 == 0 for y in outputs)
    assert len({y.ctypes.data % 4096 for y in outputs}) > 2  # two of them may be read side by side
    y, mean, rstd = lanenorm.batch_norm_forward(x)
    assert not in_the_way(y, x, 512)
    for other in (16, 100, 250, 2048 + 200, 3900):
        dy = at_byte(np.ones((256, 256), np.float32), offset + other)
        dx = lanenorm.batch_norm_backward(dy, x, mean, rstd).dx
        assert not in_the_way(dx, x, 1024)  # 512 bytes are not enough for three
        assert not in_the_way(dx, dy, 1024)


def test_pool_outputs_are_whole_wherever_they_begin(pool):
    """A block lent again and again at other places within its first page; then unmapped."""
    rng = np.random.default_rng(0)
    before = pool.used_bytes()
    for offset in rng.integers(0, 1024, 50) * 4:
        y = lanenorm.layer_norm(at_byte(np.ones((1 << 10, 1 << 10), np.float32), int(offset)))
        y[...] = 1
        assert pool.total_bytes() == before + (4 << 20)
        del y
    pool.free_all_blocks()
    assert pool.free_bytes() == 0


@pytest.mark.parametrize(("size", "error"), [(1.5, TypeError), (True, TypeError), (None, TypeError), (-1, ValueError)])
def test_pool_refuses_other_limits(pool, size, error):
    limit = pool.get_limit()
    with pytest.raises(error, match="set_limit: size"):
        pool.set_limit(size)
    assert pool.get_limit() == limit


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_pool_works_in_a_forked_child(pool):
    y = make(4)
    y[:] = 5
    free = make(4)
    del free
    child = os.fork()
    if child == 0:
        status = 1
        try:
            z = make(4)  # takes the block that lies free in parent and child
            z[:] = 1
            status = 0 if np.all(y == 5) and pool.free_bytes() == 0 else 2
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert np.all(y == 5)
    assert pool.free_bytes() == 4 << 20
