// F32x16 and F64x8 of one ISA against scalar code, lane by lane and bit by bit (any NaN equals any NaN).
//
// Compiled once per ISA with -DLANENORM_ISA=<name> and the flags of that ISA. Conversions of 16-bit types are compared
// with core/halves.hpp, which test_halves.cpp compares with the definition of the formats.
// clang-format off: it would put spaces into the path
#define SIMD_HEADER_OF(isa) SIMD_QUOTED(cpu/simd_##isa.hpp)
// clang-format on
#define SIMD_QUOTED(path) #path
#define SIMD_HEADER(isa) SIMD_HEADER_OF(isa)
#include SIMD_HEADER(LANENORM_ISA)

#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "check.hpp"
#include "core/halves.hpp"

namespace {

using lanenorm::BFloat16;
using lanenorm::F32x16;
using lanenorm::F64x8;
using lanenorm::Float16;

const std::string kIsa = SIMD_HEADER(LANENORM_ISA);

bool usable() {
#if defined(__x86_64__)
  if (kIsa.find("avx2") != std::string::npos) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  }
  if (kIsa.find("avx512") != std::string::npos) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
  }
#endif
  return true;
}

// ---- values ------------------------------------------------------------------------------------------------------

template <class S>
struct Lanes {
  S v[16];
};

template <class V, class S = typename V::Scalar>
V of(const Lanes<S>& lanes) {
  return V::template load<S>(lanes.v);
}
template <class V, class S = typename V::Scalar>
Lanes<S> lanes_of(V vector) {
  Lanes<S> lanes{};
  vector.template store<S>(lanes.v);
  return lanes;
}

template <class S>
bool same(S a, S b) {
  return (std::isnan(a) && std::isnan(b)) || std::memcmp(&a, &b, sizeof a) == 0;
}

template <class T>
bool same_element(const T& a, const T& b) {
  return same(lanenorm::widen(a), lanenorm::widen(b));
}
bool same_element(float a, float b) { return same(a, b); }
bool same_element(double a, double b) { return same(a, b); }

// What load and store of one element must do.
template <class S, class T>
S widened(T value) {
  if constexpr (sizeof(T) == 2) {
    return static_cast<S>(lanenorm::widen(value));
  } else {
    return static_cast<S>(value);
  }
}
template <class T, class S>
T narrowed(S value) {
  if constexpr (sizeof(T) == 2) {
    return lanenorm::narrow<T>(static_cast<float>(value));
  } else {
    return static_cast<T>(value);
  }
}

template <class S>
std::vector<S> special_values() {
  using L = std::numeric_limits<S>;
  std::vector<S> values = {S(0),
                           S(1),
                           S(1) + L::epsilon(),
                           S(1.5),
                           S(2),
                           S(3),
                           S(0.1),
                           S(65520),
                           S(1e-20),
                           S(1e20),
                           L::min(),
                           L::min() / S(2),
                           L::denorm_min(),
                           L::max(),
                           L::infinity(),
                           L::quiet_NaN(),
                           S(1) / S(3)};
  const std::size_t positive = values.size();
  for (std::size_t i = 0; i < positive; ++i) values.push_back(-values[i]);
  return values;
}

std::mt19937_64 generator(20240229);

// Any bit pattern, so that subnormals, infinities and NaN occur too; or values of like size, so that sums round.
template <class S>
S random_value() {
  const std::uint64_t bits = generator();
  if (bits & 1) return static_cast<S>(static_cast<double>(bits >> 11) * 0x1p-50 - 4.0);
  S value;
  std::memcpy(&value, reinterpret_cast<const char*>(&bits) + 8 - sizeof value, sizeof value);
  return value;
}

template <class V, class S = typename V::Scalar>
Lanes<S> random_lanes() {
  Lanes<S> lanes{};
  for (int i = 0; i < V::kLanes; ++i) lanes.v[i] = random_value<S>();
  return lanes;
}

// ---- arithmetic --------------------------------------------------------------------------------------------------

template <class V, class S = typename V::Scalar>
void check_operations(const Lanes<S>& a, const Lanes<S>& b, const Lanes<S>& c) {
  const V x = of<V>(a), y = of<V>(b), z = of<V>(c);
  const Lanes<S> sum = lanes_of(x + y), difference = lanes_of(x - y), product = lanes_of(x * y);
  const Lanes<S> quotient = lanes_of(x / y), fused = lanes_of(fma(x, y, z)), root = lanes_of(sqrt(x));
  const Lanes<S> negated = lanes_of(negate(x)), magnitude = lanes_of(abs(x));
  for (int i = 0; i < V::kLanes; ++i) {
    CHECK(same(sum.v[i], a.v[i] + b.v[i]));
    CHECK(same(difference.v[i], a.v[i] - b.v[i]));
    CHECK(same(product.v[i], a.v[i] * b.v[i]));
    CHECK(same(quotient.v[i], a.v[i] / b.v[i]));
    CHECK(same(fused.v[i], std::fma(a.v[i], b.v[i], c.v[i])));
    CHECK(same(root.v[i], std::sqrt(a.v[i])));
    CHECK(same(negated.v[i], -a.v[i]));
    CHECK(same(magnitude.v[i], std::fabs(a.v[i])));
  }
}

template <class V, class S = typename V::Scalar>
void operations_round_once() {
  const std::vector<S> special = special_values<S>();
  const std::size_t n = special.size();
  Lanes<S> a{}, b{}, c{};
  int lane = 0;
  for (std::size_t i = 0; i < n * n * n; ++i) {  // every triple
    a.v[lane] = special[i % n];
    b.v[lane] = special[i / n % n];
    c.v[lane] = special[i / n / n];
    if (++lane < V::kLanes) continue;
    check_operations<V>(a, b, c);
    lane = 0;
  }
  for (int i = 0; i < 3000; ++i) {
    check_operations<V>(random_lanes<V>(), random_lanes<V>(), random_lanes<V>());
  }
  // a * b + c with two roundings would be 0
  const S tiny = std::numeric_limits<S>::epsilon();
  const V one_and = V::broadcast(S(1) + tiny);
  CHECK(same(lanes_of(fma(one_and, one_and, negate(one_and * one_and))).v[0], tiny * tiny));
}

template <class V, class S = typename V::Scalar>
void fold_halves() {
  Lanes<S> counting{};
  for (int i = 0; i < V::kLanes; ++i) counting.v[i] = S(i);
  CHECK_EQ(of<V>(counting).fold(), S(V::kLanes * (V::kLanes - 1) / 2));
  for (int trial = 0; trial < 3000; ++trial) {
    const Lanes<S> lanes = random_lanes<V>();
    S sum[16];
    for (int i = 0; i < V::kLanes; ++i) sum[i] = lanes.v[i];
    for (int half = V::kLanes / 2; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) sum[i] += sum[half + i];
    }
    CHECK(same(of<V>(lanes).fold(), sum[0]));
  }
}

template <class V>
void fold8_folds_each() {
  for (int trial = 0; trial < 3000; ++trial) {
    V vectors[8];
    for (V& vector : vectors) vector = of<V>(random_lanes<V>());
    const Lanes<double> folds = lanes_of(V::fold8(vectors));
    for (int i = 0; i < 8; ++i) CHECK(same(folds.v[i], static_cast<double>(vectors[i].fold())));
  }
}

template <class V, class S = typename V::Scalar>
void lanes_are_kept_and_filled() {
  const Lanes<S> zero = lanes_of(V::zero()), pi = lanes_of(V::broadcast(S(3.14)));
  for (int i = 0; i < V::kLanes; ++i) {
    CHECK(same(zero.v[i], S(0)));
    CHECK(same(pi.v[i], S(3.14)));
  }
  for (const S value : special_values<S>()) {
    for (int count = 0; count <= V::kLanes; ++count) {
      const Lanes<S> kept = lanes_of(keep(V::broadcast(value), count));
      for (int i = 0; i < V::kLanes; ++i) CHECK(same(kept.v[i], i < count ? value : S(0)));
      const Lanes<S> joined = lanes_of(join(V::broadcast(value), count, V::broadcast(S(3))));
      for (int i = 0; i < V::kLanes; ++i) CHECK(same(joined.v[i], i < count ? value : S(3)));
    }
  }
}

template <class V, class S = typename V::Scalar>
void lanes_are_compared() {
  const std::vector<S> special = special_values<S>();
  for (int trial = 0; trial < 3000; ++trial) {
    Lanes<S> a = random_lanes<V>(), b = random_lanes<V>();
    for (int i = 0; i < V::kLanes; ++i) {  // specials, and equal ones
      const auto pick = static_cast<std::size_t>(trial + 7 * i) % special.size();
      if ((trial + i) % 3 == 0) a.v[i] = special[pick];
      if ((trial + i) % 5 == 0) b.v[i] = special[static_cast<std::size_t>(trial) % special.size()];
      if ((trial + i) % 4 == 0) b.v[i] = a.v[i];
    }
    unsigned expected = 0;
    for (int i = 0; i < V::kLanes; ++i) expected |= static_cast<unsigned>(a.v[i] <= b.v[i]) << i;
    CHECK(at_most(of<V>(a), of<V>(b)) == expected);
  }
}

template <class V, class S = typename V::Scalar>
void wide_and_narrow_convert() {
  const std::vector<double> special = special_values<double>();
  for (std::size_t trial = 0; trial < 3000; ++trial) {
    const Lanes<S> lanes = random_lanes<V>();
    double doubles[16];
    F64x8 parts[V::kWide];
    for (int part = 0; part < V::kWide; ++part) {
      const Lanes<double> wide = lanes_of(of<V>(lanes).wide(part));
      for (int i = 0; i < 8; ++i) CHECK(same(wide.v[i], static_cast<double>(lanes.v[8 * part + i])));
      for (int i = 0; i < 8; ++i) {
        double& value = doubles[8 * part + i];
        value =
            i < 2 ? special[(trial + static_cast<std::size_t>(i)) % special.size()]
                  : static_cast<double>(random_value<float>()) * (i < 5 ? 1.0 + random_value<double>() * 0x1p-60 : 1.0);
      }
      parts[part] = F64x8::load<double>(doubles + 8 * part);
    }
    const Lanes<S> narrow = lanes_of(V::narrow(parts));
    for (int i = 0; i < V::kLanes; ++i) CHECK(same(narrow.v[i], static_cast<S>(doubles[i])));
  }
}

// ---- memory ------------------------------------------------------------------------------------------------------

// `kLanes` elements at any address, loaded whole and by every count.
template <class T, class V, class S = typename V::Scalar>
void check_load(const char* p, const T* elements) {
  const Lanes<S> all = lanes_of(V::template load<T>(p));
  for (int i = 0; i < V::kLanes; ++i) CHECK(same(all.v[i], widened<S>(elements[i])));
  for (int count = 0; count <= V::kLanes; ++count) {
    const Lanes<S> some = lanes_of(V::template load<T>(p, count));
    for (int i = 0; i < V::kLanes; ++i) CHECK(same(some.v[i], i < count ? widened<S>(elements[i]) : S(0)));
  }
}

// Stores whole and by every count, at an odd address, with bytes around that must stay.
template <class T, class V, class S = typename V::Scalar>
void check_store(const Lanes<S>& lanes) {
  constexpr std::size_t kMargin = 65, kBytes = V::kLanes * sizeof(T);
  for (int count = 0; count <= V::kLanes + 1; ++count) {  // the last: whole
    unsigned char memory[2 * kMargin + kBytes];
    std::memset(memory, 0xa5, sizeof memory);
    const V vector = of<V>(lanes);
    if (count > V::kLanes) {
      vector.template store<T>(memory + kMargin);
    } else {
      vector.template store<T>(memory + kMargin, count);
    }
    for (int i = 0; i < V::kLanes && i < count; ++i) {
      T element;
      std::memcpy(&element, memory + kMargin + static_cast<std::size_t>(i) * sizeof(T), sizeof(T));
      CHECK(same_element(element, narrowed<T>(lanes.v[i])));
    }
    const std::size_t end = count > V::kLanes ? kBytes : static_cast<std::size_t>(count) * sizeof(T);
    bool untouched = true;
    for (std::size_t i = 0; i < sizeof memory; ++i) {
      if (i < kMargin || i >= kMargin + end) untouched = untouched && memory[i] == 0xa5;
    }
    CHECK(untouched);
  }
}

// stream() writes what store() writes, and nothing else.
template <class T, class V, class S = typename V::Scalar>
void check_stream(const Lanes<S>& lanes) {
  constexpr std::size_t kBytes = V::kLanes * sizeof(T);
  alignas(64) unsigned char streamed[64 + kBytes + 64], stored[sizeof streamed];
  std::memset(streamed, 0xa5, sizeof streamed);
  std::memset(stored, 0xa5, sizeof stored);
  of<V>(lanes).template stream<T>(streamed + 64);
  of<V>(lanes).template store<T>(stored + 64);
  CHECK(std::memcmp(streamed, stored, sizeof stored) == 0);
}

// All bit patterns of a 16-bit type.
template <class T, class V, class S = typename V::Scalar>
void halves_load_and_store() {
  constexpr std::size_t kStep = V::kLanes;
  std::vector<T> patterns(0x10000);
  for (std::size_t i = 0; i < patterns.size(); ++i) patterns[i].bits = static_cast<std::uint16_t>(i);
  std::vector<char> odd(1 + patterns.size() * sizeof(T));
  std::memcpy(odd.data() + 1, patterns.data(), patterns.size() * sizeof(T));
  for (std::size_t i = 0; i < patterns.size(); i += kStep) {
    check_load<T, V>(odd.data() + 1 + i * sizeof(T), patterns.data() + i);
    T back[kStep];
    V::template load<T>(patterns.data() + i).template store<T>(back);
    for (std::size_t j = 0; j < kStep; ++j) CHECK(same_element(back[j], patterns[i + j]));
  }
}

// Around every value of a 16-bit type and every tie between two. Float lanes have one rounding; double lanes two.
template <class T, class V, class S = typename V::Scalar>
void halves_round() {
  Lanes<S> lanes{};
  int lane = 0;
  const auto probe = [&](S value) {
    lanes.v[lane] = value;
    if (++lane < V::kLanes) return;
    lane = 0;
    T stored[V::kLanes];
    of<V>(lanes).template store<T>(stored);
    for (int i = 0; i < V::kLanes; ++i) CHECK(same_element(stored[i], narrowed<T>(lanes.v[i])));
  };
  constexpr S kInfinity = std::numeric_limits<S>::infinity();
  for (int bits = 0; bits < 0x10000; ++bits) {
    const int next = bits % 0x8000 == 0x7fff ? bits : bits + 1;
    const S value = widened<S>(T{static_cast<std::uint16_t>(bits)});
    const S above = widened<S>(T{static_cast<std::uint16_t>(next)});
    const S middle = value / S(2) + above / S(2);
    for (const S v : {value, middle}) {
      probe(v);
      probe(std::nextafter(v, kInfinity));
      probe(std::nextafter(v, -kInfinity));
    }
  }
  // NaN that would become infinity if its low bits were dropped, or -0 if they were rounded up
  for (const std::uint32_t bits : {0x7f800001u, 0x7fffffffu, 0xff800001u, 0xffffffffu}) {
    probe(static_cast<S>(lanenorm::float_of(bits)));
  }
  for (int i = 0; i < 40000; ++i) probe(random_value<S>());
}

template <class T, class V, class S = typename V::Scalar>
void memory_is_read_and_written() {
  for (int trial = 0; trial < 300; ++trial) {
    check_store<T, V>(random_lanes<V>());
    check_stream<T, V>(random_lanes<V>());
  }
  T elements[V::kLanes + 1];
  char bytes[sizeof elements];
  for (int trial = 0; trial < 300; ++trial) {
    for (T& element : elements) element = narrowed<T>(random_value<double>());
    std::memcpy(bytes + 1, elements, V::kLanes * sizeof(T));
    check_load<T, V>(bytes + 1, elements);
  }
}

// One page between two that must not be touched.
class GuardedPage {
 public:
  GuardedPage() : size_(static_cast<std::size_t>(sysconf(_SC_PAGESIZE))) {
    void* pages = mmap(nullptr, 3 * size_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages != MAP_FAILED) base_ = static_cast<char*>(pages);
    if (base_ == nullptr || mprotect(base_ + size_, size_, PROT_READ | PROT_WRITE) != 0) std::perror("mmap");
  }
  ~GuardedPage() { munmap(base_, 3 * size_); }
  GuardedPage(const GuardedPage&) = delete;
  GuardedPage& operator=(const GuardedPage&) = delete;
  char* begin() const { return base_ + size_; }
  char* end() const { return base_ + 2 * size_; }

 private:
  std::size_t size_;
  char* base_ = nullptr;
};

// Ends by SIGSEGV where it fails.
template <class T, class V>
void nothing_beyond_count_is_touched() {
  const GuardedPage page;
  for (int count = 0; count <= V::kLanes; ++count) {
    const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(T);
    for (char* p : {page.begin(), page.end() - bytes}) {
      V::broadcast(1).template store<T>(p, count);
      CHECK_EQ(V::template load<T>(p, count).fold(), static_cast<typename V::Scalar>(count));
    }
  }
  char* last = page.end() - V::kLanes * sizeof(T);
  V::broadcast(2).template store<T>(last);
  CHECK_EQ(V::template load<T>(last).fold(), static_cast<typename V::Scalar>(2 * V::kLanes));
}

template <class V>
void check_arithmetic() {
  operations_round_once<V>();
  fold_halves<V>();
  lanes_are_kept_and_filled<V>();
  lanes_are_compared<V>();
  wide_and_narrow_convert<V>();
}

template <class T, class V>
void check_memory() {
  memory_is_read_and_written<T, V>();
  nothing_beyond_count_is_touched<T, V>();
  if constexpr (sizeof(T) == 2) {
    halves_load_and_store<T, V>();
    halves_round<T, V>();
  }
}

}  // namespace

int main() {
  if (!usable()) {
    std::printf("skipped: this CPU has not what %s needs\n", kIsa.c_str());
    return 0;
  }
  check_arithmetic<F32x16>();
  check_arithmetic<F64x8>();
  fold8_folds_each<F64x8>();
  fold8_folds_each<F32x16>();
  check_memory<Float16, F32x16>();
  check_memory<BFloat16, F32x16>();
  check_memory<float, F32x16>();
  check_memory<Float16, F64x8>();
  check_memory<BFloat16, F64x8>();
  check_memory<float, F64x8>();
  check_memory<double, F64x8>();
  return finish();
}
