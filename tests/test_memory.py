"""Outputs come from a pool: reused, owned by their arrays, bounded, safe after fork."""

import os

import numpy as np
import pytest

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
    assert again.ctypes.data == address
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
    last = arrays[-1].ctypes.data
    while arrays:
        del arrays[0]
        assert pool.free_bytes() <= 8 << 20
    assert pool.n_free_blocks() == 2
    assert make(4).ctypes.data == last  # what was freed last is used first
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


def test_pool_arrays_lie_on_cache_lines_beside_each_other_and_the_start_of_a_page(pool):
    arrays = [make(megabytes) for megabytes in (1, 2, 4, 6)]
    places = [y.ctypes.data % 4096 for y in arrays]
    assert all(place % 64 == 0 and place % 512 != 0 for place in places)
    assert len({place // 64 for place in places}) == 3
    for y in arrays:
        y[...] = 1  # the whole of it is there
    del arrays, y
    assert pool.free_bytes() == 13 << 20
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
