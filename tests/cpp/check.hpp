// The whole test framework of the C++ tests: a check that fails says where and goes on; main ends with
// `return finish();`. Checks may be made on any thread.
#pragma once

#include <atomic>
#include <cstdio>
#include <exception>
#include <sstream>
#include <string>
#include <type_traits>

namespace test {

inline std::atomic<int> checks{0};
inline std::atomic<int> failures{0};

// Allocates nothing unless it fails.
inline bool check(bool passed, const char* file, int line, const char* text) {
  checks.fetch_add(1, std::memory_order_relaxed);
  if (passed) return true;
  failures.fetch_add(1, std::memory_order_relaxed);
  std::fprintf(stderr, "%s:%d: %s\n", file, line, text);
  return false;
}

template <class A, class B>
bool check_equal(const A& a, const B& b, const char* file, int line, const char* text) {
  if (a == b) return check(true, file, line, text);
  std::ostringstream stream;
  stream.precision(17);
  stream << text << ": " << a << " and " << b;
  return check(false, file, line, stream.str().c_str());
}

// part: text that the exception's what() has to contain; "" for types without what().
template <class Exception, class Function>
bool check_throws(Function function, const char* file, int line, const char* text, const std::string& part) {
  std::string got = "nothing";
  try {
    function();
  } catch (const Exception& error) {
    if constexpr (std::is_base_of_v<std::exception, Exception>) got = std::string("'") + error.what() + "'";
    if (got.find(part) != std::string::npos) return check(true, file, line, text);
  } catch (const std::exception& error) {
    got = std::string("another exception: ") + error.what();
  } catch (...) {
    got = "another exception";
  }
  return check(false, file, line, (std::string(text) + " '" + part + "', got " + got).c_str());
}

}  // namespace test

#define CHECK(condition) test::check(static_cast<bool>(condition), __FILE__, __LINE__, #condition)
#define CHECK_EQ(a, b) test::check_equal(a, b, __FILE__, __LINE__, #a " == " #b)
// CHECK_THROWS(std::invalid_argument, "n is 0", set_num_threads(0));  "" accepts any text
#define CHECK_THROWS(exception, part, ...) \
  test::check_throws<exception>([&] { __VA_ARGS__; }, __FILE__, __LINE__, #__VA_ARGS__ " throws " #exception, part)

// The exit code of main.
inline int finish() {
  std::printf("%d checks, %d failures\n", test::checks.load(), test::failures.load());
  return test::failures.load() == 0 ? 0 : 1;
}
