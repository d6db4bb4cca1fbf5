// What kernels ask about memory: addresses, alignment, copies that are under way; and the memory of an operation.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>

#include "cuda_on_host/machine.hpp"

namespace lanenorm::on_host {

void check_aligned(const void* pointer, std::size_t alignment, const char* what, Site site) {
  if (reinterpret_cast<std::uintptr_t>(pointer) % alignment == 0) return;
  char address[32];
  std::snprintf(address, sizeof address, "%p", pointer);
  fail(site, std::string(what) + " " + address + ", which is not " + std::to_string(alignment) + "-byte aligned");
}

void* shared(std::size_t byte_offset, std::size_t bytes, std::size_t alignment, Site site) {
  const std::size_t have = machine->shape.shared_bytes;
  if (byte_offset > have || bytes > have - byte_offset) {
    fail(site, "shared memory of " + std::to_string(bytes) + " bytes at offset " + std::to_string(byte_offset) +
                   ", the launch gave " + std::to_string(have));
  }
  unsigned char* result = machine->current->block->memory + byte_offset;
  check_aligned(result, alignment, "shared memory at", site);
  return result;
}

unsigned cluster_rank() { return machine->current->block->rank; }
unsigned cluster_size() { return static_cast<unsigned>(machine->shape.cluster); }

void* of_block(const void* mine, unsigned rank, Site site) {
  const Block& block = *machine->current->block;
  const auto offset = static_cast<const unsigned char*>(mine) - block.memory;
  if (offset < 0 || static_cast<std::size_t>(offset) > machine->shape.shared_bytes) {
    fail(site, "of_block of something that is not in this block's shared memory");
  }
  if (rank >= machine->blocks.size()) {
    fail(site,
         "of_block of block " + std::to_string(rank) + " of a cluster of " + std::to_string(machine->blocks.size()));
  }
  const Block& other = machine->blocks[rank];
  if (&other != &block && !machine->cluster_met) {
    fail(site, "of_block before the first sync_cluster: block " + std::to_string(rank) + " may not have started");
  }
  if (other.memory == nullptr) fail(site, "of_block of block " + std::to_string(rank) + ", which has exited");
  return other.memory + offset;
}

void begin_copy(const Copy& copy) {
  const Unnoticed unnoticed;
  Thread& me = *machine->current;
  me.copies.push_back(copy);
  ++me.uncommitted;
}

void commit_copies() {
  const Unnoticed unnoticed;
  Thread& me = *machine->current;
  me.copy_groups.push_back(me.uncommitted);
  me.uncommitted = 0;
}

std::vector<Copy> finish_copies(int pending) {
  const Unnoticed unnoticed;
  Thread& me = *machine->current;
  std::vector<Copy> due;
  while (me.copy_groups.size() > static_cast<std::size_t>(pending)) {
    const auto count = static_cast<std::ptrdiff_t>(me.copy_groups.front());
    me.copy_groups.erase(me.copy_groups.begin());
    due.insert(due.end(), me.copies.begin(), me.copies.begin() + count);
    me.copies.erase(me.copies.begin(), me.copies.begin() + count);
  }
  return due;
}

Workspace::~Workspace() {
  for (void* block : blocks_) std::free(block);
}

void* Workspace::allocate(std::size_t bytes) {
  void* block = nullptr;
  if (posix_memalign(&block, 256, bytes == 0 ? 1 : bytes) != 0) throw std::bad_alloc();
  blocks_.push_back(block);
  std::memset(block, kPoison, bytes);
  return block;
}

}  // namespace lanenorm::on_host
