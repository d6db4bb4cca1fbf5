// The thread pool: parallel_for runs fixed pieces of work on the caller and on pool threads. Which thread runs which
// piece is left to the pool, so results must be fixed by the pieces alone: a piece writes only memory of its own, and
// what pieces leave is merged afterwards in index order.
//
// Own threads, not OpenMP, because libgomp hangs in a forked child, keeps its limits per calling thread, and spins for
// whole scheduler ticks on a busy machine. Nothing here ever waits for another caller: a call that finds the pool taken
// runs on its own thread.
#pragma once

#include <cstdint>
#include <memory>
#include <type_traits>

namespace lanenorm {

// Threads a parallel_for may use, the caller included; process-wide, kept across fork(). Decided at first use by
// thread_count.hpp; while LANENORM_NUM_THREADS is not an integer >= 1, this, set_num_threads and parallel_for throw
// std::invalid_argument before doing anything. Any thread; starts no thread.
int get_num_threads();

// Returns the previous count. std::invalid_argument for n < 1. Any thread at any time: calls that are running keep
// the count they began with. Beyond 1024 the pool uses 1024.
int set_num_threads(int n);

// Thrown by parallel_for when the interrupt hook returned true.
struct Interrupted {};

// hook: asks whether to stop (Ctrl-C); nullptr: none. It is called between pieces and while waiting, about every 50 ms,
// on the thread that called parallel_for and never on a pool thread; not in a call, or a run of calls in quick
// succession, that lasts less. It may take locks (the GIL) and may end its thread (pthread_exit). One hook for the
// process.
void set_interrupt_hook(bool (*hook)());

// A job that moves less memory than this runs on the calling thread. First guess, from a sweep y = a*x + b within the
// L2 cache (2-core x86-64 VM, worker awake): 64 KiB take 1.8 us on two threads and 1.1 on one, 128 KiB 2.5 and 1.6..4.2
// (the more, the more lines the other core has), 256 KiB 3.7 and 3.2..5.2. To be measured again with the kernels.
inline constexpr std::int64_t kSerialBytes = 128 * 1024;

// piece: index in [0, pieces); context: what was given with it.
using PieceFunction = void (*)(void* context, std::int64_t piece);

// parallel_for below, with the body as function and context.
void run_pieces(std::int64_t pieces, std::int64_t bytes, PieceFunction function, void* context);

// Runs body(piece) once for every piece in [0, pieces) and returns when all are done; what bodies wrote is then visible
// to the caller, and to whom the caller tells; so is, in a job of kSerialBytes and more, what they wrote past the
// caches. Any thread. No allocation once the pool's threads are running.
//
// bytes: memory traffic of the whole job, which decides how many threads it is worth. Below kSerialBytes, inside
// another parallel_for, or while another thread's call has the pool, the caller runs all pieces itself in index order.
// Every thread that takes part runs under a FloatEnvironment.
//
// An exception from a body drops the pieces not yet begun; when every thread has left the job, the first one is
// rethrown here. So is Interrupted, which goes before it, as the hook has left its own error with its owner. In both
// cases some pieces have run and some have not.
//
// body runs on several threads at once; it may call parallel_for (serial) but must not wait for another piece.
template <class Body>
void parallel_for(std::int64_t pieces, std::int64_t bytes, Body&& body) {
  using Plain = std::remove_reference_t<Body>;
  run_pieces(
      pieces, bytes, [](void* context, std::int64_t piece) { (*static_cast<Plain*>(context))(piece); },
      const_cast<void*>(static_cast<const void*>(std::addressof(body))));
}

}  // namespace lanenorm
