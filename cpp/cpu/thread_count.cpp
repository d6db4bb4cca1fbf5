#include "cpu/thread_count.hpp"

#include <sched.h>

#include <cstdlib>
#include <fstream>
#include <iterator>
#include <sstream>
#include <stdexcept>
#include <thread>

namespace lanenorm {
namespace {

std::string content(const std::string& path) {
  std::ifstream file(path);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

int smaller_limit(int a, int b) { return a == 0 ? b : b == 0 ? a : a < b ? a : b; }

int affinity() {
  // Larger machines than cpu_set_t's 1024 processors need a larger mask.
  for (int processors = CPU_SETSIZE; processors <= 1 << 20; processors *= 2) {
    cpu_set_t* set = CPU_ALLOC(static_cast<std::size_t>(processors));
    if (set == nullptr) break;
    const std::size_t bytes = CPU_ALLOC_SIZE(static_cast<std::size_t>(processors));
    const bool known = sched_getaffinity(0, bytes, set) == 0;
    const int count = known ? CPU_COUNT_S(bytes, set) : 0;
    CPU_FREE(set);
    if (known && count > 0) return count;
  }
  const unsigned count = std::thread::hardware_concurrency();
  return count == 0 ? 1 : static_cast<int>(count);
}

// f(directory) for the group and all above it.
template <class F>
void each_parent(const std::string& root, std::string group, F&& f) {
  for (;;) {
    while (!group.empty() && group.back() == '/') group.pop_back();
    f(root + group);
    if (group.empty()) return;
    group.erase(group.rfind('/') == std::string::npos ? 0 : group.rfind('/'));
  }
}

}  // namespace

int threads_of_variable(const char* name, const char* value) {
  char* end = nullptr;
  const long count = std::strtol(value, &end, 10);
  if (end == value || *end != '\0' || count < 1 || count > 65536) {
    throw std::invalid_argument(std::string(name) + ": '" + value + "' is no number of threads, expected an integer >= 1");
  }
  return static_cast<int>(count);
}

int threads_of_omp(const char* value) {
  if (value == nullptr) return 0;
  char* end = nullptr;
  const long count = std::strtol(value, &end, 10);
  if (end == value || (*end != '\0' && *end != ',' && *end != ' ') || count < 1 || count > 65536) return 0;
  return static_cast<int>(count);
}

int threads_of_cpu_max(const std::string& cpu_max) {
  std::istringstream words(cpu_max);
  std::string quota;
  long long period = 0;
  if (!(words >> quota >> period) || quota == "max" || period <= 0) return 0;
  char* end = nullptr;
  const long long microseconds = std::strtoll(quota.c_str(), &end, 10);
  if (*end != '\0' || microseconds <= 0) return 0;
  const long long threads = (microseconds + period - 1) / period;
  return threads > 65536 ? 0 : static_cast<int>(threads);
}

int threads_of_cgroup(const std::string& root, const std::string& self) {
  int limit = 0;
  std::istringstream lines(self);
  for (std::string line; std::getline(lines, line);) {  // hierarchy:controllers:path
    const std::size_t first = line.find(':');
    const std::size_t second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
    const std::string group = line.substr(second + 1);
    if (controllers == ",,") {  // version 2
      each_parent(root, group, [&](const std::string& directory) {
        limit = smaller_limit(limit, threads_of_cpu_max(content(directory + "/cpu.max")));
      });
    } else if (controllers.find(",cpu,") != std::string::npos) {  // version 1
      each_parent(root + "/cpu", group, [&](const std::string& directory) {
        const std::string quota = content(directory + "/cpu.cfs_quota_us");
        const std::string period = content(directory + "/cpu.cfs_period_us");
        if (!quota.empty() && !period.empty()) limit = smaller_limit(limit, threads_of_cpu_max(quota + " " + period));
      });
    }
  }
  return limit;
}

int default_thread_count() {
  const char* own = std::getenv("LANENORM_NUM_THREADS");
  if (own != nullptr && *own != '\0') return threads_of_variable("LANENORM_NUM_THREADS", own);
  const int omp = threads_of_omp(std::getenv("OMP_NUM_THREADS"));
  if (omp > 0) return omp;
  return smaller_limit(affinity(), threads_of_cgroup("/sys/fs/cgroup", content("/proc/self/cgroup")));
}

}  // namespace lanenorm
