// How many threads to use when nobody said: LANENORM_NUM_THREADS, else OMP_NUM_THREADS, else the CPUs this process may
// really use: min(scheduler affinity, CPU quota of its cgroups). A container with a quota of 2 CPUs on a 64-core host
// would otherwise start 64 threads that throttle each other. Pure functions of texts and paths, so that tests reach
// them; only default_num_threads() at the end looks at the process.
#pragma once

#include <sched.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace lanenorm::thread_count {

// A decimal integer >= 1 that fits an int, blanks around it allowed; 0 for anything else.
inline int parse_count(const std::string& text) {
  const std::size_t first = text.find_first_not_of(" \t\n");
  if (first == std::string::npos) return 0;
  const std::string digits = text.substr(first, text.find_last_not_of(" \t\n") - first + 1);
  if (digits.find_first_not_of("0123456789") != std::string::npos) return 0;
  std::int64_t value = 0;
  for (const char digit : digits) {
    value = value * 10 + (digit - '0');
    if (value > std::numeric_limits<int>::max()) return 0;
  }
  return static_cast<int>(value);
}

// Values of the two variables (null: not set; empty counts as not set) and the CPUs there are -> threads.
// std::invalid_argument for a bad LANENORM_NUM_THREADS. A bad OMP_NUM_THREADS is others' matter and is ignored; of a
// list ("4,2", one number per nesting level) the first counts.
inline int choose(const char* lanenorm_value, const char* omp_value, int cpus) {
  if (lanenorm_value != nullptr && *lanenorm_value != '\0') {
    const int count = parse_count(lanenorm_value);
    if (count == 0) {
      throw std::invalid_argument(std::string("LANENORM_NUM_THREADS is '") + lanenorm_value +
                                  "', expected an integer >= 1");
    }
    return count;
  }
  if (omp_value != nullptr) {
    const std::string list = omp_value;
    const int count = parse_count(list.substr(0, list.find(',')));
    if (count > 0) return count;
  }
  return std::max(cpus, 1);
}

// ---- cgroups: every quota below is in CPUs, rounded up, and 0 where there is none -----------------------------------

inline int quota_cpus(double quota, double period) {
  if (!(quota > 0 && period > 0)) return 0;
  const double cpus = __builtin_ceil(quota / period);
  return cpus < 1e6 ? static_cast<int>(cpus) : 0;
}

// Version 2, the text of cpu.max: "max 100000" or "150000 100000" (quota and period, microseconds).
inline int cpu_max_cpus(const std::string& text) {
  std::istringstream stream(text);
  double quota = 0;
  double period = 0;
  return stream >> quota >> period ? quota_cpus(quota, period) : 0;
}

// Version 1, the texts of cpu.cfs_quota_us ("-1": none) and cpu.cfs_period_us.
inline int cfs_cpus(const std::string& quota_text, const std::string& period_text) {
  double quota = 0;
  double period = 0;
  const bool read = (std::istringstream(quota_text) >> quota) && (std::istringstream(period_text) >> period);
  return read ? quota_cpus(quota, period) : 0;
}

// Text of a small file; empty where it cannot be read.
inline std::string contents(const std::string& path) {
  std::ifstream file(path);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

// self: text of /proc/self/cgroup, lines "0::/path" (version 2) or "4:cpu,cpuacct:/path" (version 1).
// root: where cgroups are mounted, /sys/fs/cgroup.
// The tightest quota of the process's group and all groups above it (a quota holds for everything below). In a
// container the path may be the host's and not exist here; the walk up then still reaches the container's own group.
inline int cgroup_cpus(const std::string& self, const std::string& root) {
  int least = 0;
  const auto take = [&](int cpus) {
    if (cpus > 0 && (least == 0 || cpus < least)) least = cpus;
  };
  std::istringstream lines(self);
  for (std::string line; std::getline(lines, line);) {
    const std::size_t first = line.find(':');
    const std::size_t second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
    const bool version_2 = controllers == ",,";
    if (!version_2 && controllers.find(",cpu,") == std::string::npos) continue;

    std::string path = line.substr(second + 1);
    if (path.find("/..") != std::string::npos) path.clear();  // outside of this cgroup namespace
    while (!path.empty() && path.back() == '/') path.pop_back();
    for (;; path.erase(path.rfind('/'))) {
      if (version_2) {
        for (const char* mount : {"", "/unified"}) take(cpu_max_cpus(contents(root + mount + path + "/cpu.max")));
      } else {
        for (const char* mount : {"/cpu", "/cpu,cpuacct", "/cpuacct,cpu"}) {
          const std::string group = root + mount + path;
          take(cfs_cpus(contents(group + "/cpu.cfs_quota_us"), contents(group + "/cpu.cfs_period_us")));
        }
      }
      if (path.find('/') == std::string::npos) break;
    }
  }
  return least;
}

// ---- this process ---------------------------------------------------------------------------------------------------

// CPUs the calling thread may run on. cpu_set_t holds 1024; the kernel says EINVAL where the machine has more.
inline int affinity_cpus() {
  for (std::size_t cpus = 1024; cpus <= (1u << 20); cpus *= 2) {
    std::vector<cpu_set_t> set(cpus / 1024);
    const std::size_t bytes = set.size() * sizeof(cpu_set_t);
    if (sched_getaffinity(0, bytes, set.data()) == 0) return std::max(CPU_COUNT_S(bytes, set.data()), 1);
    if (errno != EINVAL) break;
  }
  return 1;
}

// Reads environment, affinity and cgroups anew at each call (some 50 us). std::invalid_argument as choose().
inline int default_num_threads() {
  int cpus = affinity_cpus();
  const int quota = cgroup_cpus(contents("/proc/self/cgroup"), "/sys/fs/cgroup");
  if (quota > 0) cpus = std::min(cpus, quota);
  return choose(std::getenv("LANENORM_NUM_THREADS"), std::getenv("OMP_NUM_THREADS"), cpus);
}

}  // namespace lanenorm::thread_count
