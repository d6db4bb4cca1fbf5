// How many threads are used when nobody said: environment variables, affinity, cgroup quotas.
#include <sched.h>

#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <stdexcept>
#include <string>
#include <thread>

#include "check.hpp"
#include "cpu/parallel.hpp"
#include "cpu/thread_count.hpp"

namespace {

using namespace lanenorm;

void test_thread_count_from_variables() {
  using namespace thread_count;
  CHECK_EQ(choose(nullptr, nullptr, 6), 6);
  CHECK_EQ(choose("3", "5", 6), 3);
  CHECK_EQ(choose(" 12 ", nullptr, 6), 12);
  CHECK_EQ(choose("", "5", 6), 5);
  CHECK_EQ(choose(nullptr, "4,2", 6), 4);
  CHECK_EQ(choose(nullptr, "many", 6), 6);
  CHECK_EQ(choose(nullptr, "0", 6), 6);
  CHECK_EQ(choose(nullptr, "", 6), 6);
  CHECK_EQ(choose(nullptr, nullptr, 0), 1);
  for (const char* bad : {"0", "-1", "two", "2.5", "4,2", "1e3", "99999999999", " "}) {
    CHECK_THROWS(std::invalid_argument, "LANENORM_NUM_THREADS is '" + std::string(bad) + "'", choose(bad, "4", 6));
  }
  CHECK(affinity_cpus() >= 1);
  std::thread([] {  // affinity is a thread's own
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(sched_getcpu(), &one);
    CHECK_EQ(sched_setaffinity(0, sizeof one, &one), 0);
    CHECK_EQ(affinity_cpus(), 1);
  })
      .join();
}

void test_thread_count_from_quota_texts() {
  using namespace thread_count;
  CHECK_EQ(cpu_max_cpus("max 100000\n"), 0);
  CHECK_EQ(cpu_max_cpus("200000 100000\n"), 2);
  CHECK_EQ(cpu_max_cpus("200001 100000\n"), 3);
  CHECK_EQ(cpu_max_cpus("50000 100000\n"), 1);
  CHECK_EQ(cpu_max_cpus("200000 0\n"), 0);
  CHECK_EQ(cpu_max_cpus(""), 0);
  CHECK_EQ(cpu_max_cpus("9223372036854775807 1"), 0);
  CHECK_EQ(cfs_cpus("-1\n", "100000\n"), 0);
  CHECK_EQ(cfs_cpus("150000\n", "100000\n"), 2);
  CHECK_EQ(cfs_cpus("", ""), 0);
}

void write(const std::string& path, const std::string& text) {
  for (std::size_t i = path.find('/', 5); i != std::string::npos; i = path.find('/', i + 1)) {
    CHECK_EQ(std::system(("mkdir -p '" + path.substr(0, i) + "'").c_str()), 0);
  }
  std::ofstream(path) << text;
}

void test_thread_count_from_cgroups() {
  using thread_count::cgroup_cpus;
  char name[] = "/tmp/lanenorm_test_XXXXXX";
  if (!CHECK(mkdtemp(name) != nullptr)) return;
  const std::string root = name;
  CHECK_EQ(cgroup_cpus("0::/\n", root), 0);
  write(root + "/v2/cpu.max", "800000 100000\n");
  write(root + "/v2/a/cpu.max", "300000 100000\n");
  write(root + "/v2/a/b/cpu.max", "max 100000\n");
  CHECK_EQ(cgroup_cpus("0::/\n", root + "/v2"), 8);
  CHECK_EQ(cgroup_cpus("0::/a\n", root + "/v2"), 3);
  CHECK_EQ(cgroup_cpus("0::/a/b\n", root + "/v2"), 3);        // the group above holds too
  CHECK_EQ(cgroup_cpus("0::/host/path\n", root + "/v2"), 8);  // not visible from the container
  CHECK_EQ(cgroup_cpus("0::/../../other\n", root + "/v2"), 8);
  write(root + "/v1/cpu,cpuacct/docker/x/cpu.cfs_quota_us", "250000\n");
  write(root + "/v1/cpu,cpuacct/docker/x/cpu.cfs_period_us", "100000\n");
  CHECK_EQ(cgroup_cpus("5:memory:/m\n4:cpu,cpuacct:/docker/x\n0::/\n", root + "/v1"), 3);
  CHECK_EQ(cgroup_cpus("4:cpuset:/docker/x\n", root + "/v1"), 0);
  write(root + "/hybrid/cpu/cpu.cfs_quota_us", "-1\n");
  write(root + "/hybrid/cpu/cpu.cfs_period_us", "100000\n");
  write(root + "/hybrid/unified/s/cpu.max", "100000 100000\n");
  CHECK_EQ(cgroup_cpus("1:cpu:/\n0::/s\n", root + "/hybrid"), 1);
  CHECK_EQ(cgroup_cpus("", root), 0);
  CHECK_EQ(cgroup_cpus("nonsense\n:\n::\n", root), 0);
  CHECK_EQ(std::system(("rm -r '" + root + "'").c_str()), 0);
}

void test_thread_count_bad_variable_at_first_use() {
  // The first test of all: it has to come before any use in this process.
  setenv("LANENORM_NUM_THREADS", "lots", 1);
  CHECK_THROWS(std::invalid_argument, "'lots', expected an integer >= 1", get_num_threads());
  CHECK_THROWS(std::invalid_argument, "'lots'", set_num_threads(2));
  CHECK_THROWS(std::invalid_argument, "'lots'", parallel_for(1, 0, [](std::int64_t) { CHECK(false); }));
  setenv("LANENORM_NUM_THREADS", "7", 1);
  CHECK_EQ(get_num_threads(), 7);
  unsetenv("LANENORM_NUM_THREADS");
  CHECK_EQ(get_num_threads(), 7);
  CHECK_EQ(set_num_threads(3), 7);
}

}  // namespace

int main() {
  test_thread_count_bad_variable_at_first_use();
  test_thread_count_from_variables();
  test_thread_count_from_quota_texts();
  test_thread_count_from_cgroups();
  return finish();
}
