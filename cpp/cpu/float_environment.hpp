// The floating-point settings every kernel computes under, whatever the caller's are: round to nearest even, subnormals
// kept (no flush-to-zero, no denormals-are-zero), exceptions masked. PyTorch's set_flush_denormal, a library linked
// with -ffast-math or a host program may have set others, and they would change bits.
#pragma once

#if !defined(__SSE__) && !defined(__aarch64__)
#include <cfenv>
#else
#include <cstdint>
#endif

namespace lanenorm {

// Sets them on this thread; the destructor puts back what it found, sticky exception flags included, so that the
// caller does not see flags raised here. Belongs to the thread that made it. It does not hold back the compiler: the
// arithmetic has to lie behind a call the compiler cannot look through (kernel table, parallel_for).
class FloatEnvironment {
 public:
  FloatEnvironment() : saved_(get()) { change(saved_, kernels()); }
  ~FloatEnvironment() { change(get(), saved_); }
  FloatEnvironment(const FloatEnvironment&) = delete;
  FloatEnvironment& operator=(const FloatEnvironment&) = delete;

 private:
#if defined(__SSE__)
  using State = std::uint32_t;  // MXCSR; 0x1F80: all six exceptions masked, everything else 0
  static State kernels() { return 0x1F80; }
  static State get() { return __builtin_ia32_stmxcsr(); }
  static void set(State state) { __builtin_ia32_ldmxcsr(state); }
  static bool same(State a, State b) { return a == b; }
#elif defined(__aarch64__)
  using State = std::uint64_t;  // FPCR; 0: no FZ, FZ16, DN, AH, no traps. The sticky flags (FPSR) are left alone.
  static State kernels() { return 0; }
  static State get() {
    State state;
    asm volatile("mrs %0, fpcr" : "=r"(state));
    return state;
  }
  static void set(State state) { asm volatile("msr fpcr, %0" : : "r"(state)); }
  static bool same(State a, State b) { return a == b; }
#else
  using State = std::fenv_t;
  static State kernels() {
    State state = get();  // FE_DFL_ENV is a pointer to a state that need not be copyable, so it is set and read back
    std::fesetenv(FE_DFL_ENV);
    const State result = get();
    std::fesetenv(&state);
    return result;
  }
  static State get() {
    State state;
    std::fegetenv(&state);
    return state;
  }
  static void set(const State& state) { std::fesetenv(&state); }
  static bool same(const State&, const State&) { return false; }
#endif

  // Writing the register stalls the pipeline (some 10 ns), reading it does not: mostly there is nothing to write.
  static void change(const State& from, const State& to) {
    if (!same(from, to)) set(to);
  }

  State saved_;
};

}  // namespace lanenorm
