// Barriers, shuffles and votes: who arrives, who waits, and what must not meet.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <stdexcept>

#include "cuda_on_host/machine.hpp"

namespace lanenorm::on_host {

// ---- Messages ----------------------------------------------------------------------------------------------------

namespace {

std::string hex(unsigned mask) {
  char text[16];
  std::snprintf(text, sizeof text, "0x%08x", mask);
  return text;
}

}  // namespace

std::string text(const Site& site) {
  const char* slash = std::strrchr(site.file, '/');
  return std::string(slash == nullptr ? site.file : slash + 1) + ":" + std::to_string(site.line);
}

std::string text(const Call& call) {
  std::string result = std::string(name(call.kind)) + " at " + text(call.site);
  if (call.kind != Kind::block && call.kind != Kind::cluster) result += " with mask " + hex(call.mask);
  if (call.kind == Kind::shuffle) result += " of " + std::to_string(4 * call.words) + " bytes";
  return result;
}

std::string text(const Thread& thread) {
  return "block " + std::to_string(thread.block->index) + ", thread " + std::to_string(thread.index);
}

void fail(Site site, const std::string& message) {
  throw std::runtime_error("cuda_on_host: " + text(*machine->current) + ", " + text(site) + ": " + message);
}

namespace {

// First of the lanes in `lanes`.
Thread& thread_of(Block& block, const Warp& warp, unsigned lanes) {
  const auto first = static_cast<unsigned>(&warp - block.warps.data()) * kLanes;
  return block.threads[first + static_cast<unsigned>(__builtin_ctz(lanes))];
}

[[noreturn]] void mismatch(const Call& mine, const Thread& other) {
  fail(mine.site, text(mine) + " meets " + text(other.call) + " (" + text(other) + ")");
}

[[noreturn]] void gone(const Call& mine, const Thread& other) {
  fail(mine.site, text(mine) + " waits for thread " + std::to_string(other.index) + " of block " +
                      std::to_string(other.block->index) + ", which has exited");
}

// ---- Waiting -----------------------------------------------------------------------------------------------------

// The current thread waits until someone sets it running.
void wait(const Call& call) {
  Thread& me = *machine->current;
  me.state = State::waits;
  me.call = call;
}

void leave() {
  Thread& me = *machine->current;
  me.fiber->switch_to(&machine->scheduler);
}

// Lanes: the rendezvous `call` of the current thread. complete(threads of the warp) is run by the last to arrive.
template <class F>
void meet_lanes(const Call& call, bool orders_memory, F&& complete) {
  Thread& me = *machine->current;
  Block& block = *me.block;
  Warp& warp = warp_of(me);
  Thread* const threads = &me - me.lane();
  const unsigned bit = 1u << me.lane();
  if ((call.mask & bit) == 0) fail(call.site, text(call) + " by lane " + std::to_string(me.lane()) + ", not in it");
  if ((call.mask & ~warp.lanes) != 0) {
    fail(call.site, text(call) + " names lanes " + hex(call.mask & ~warp.lanes) + ", which the block does not have");
  }
  if ((call.mask & warp.exited) != 0) gone(call, thread_of(block, warp, call.mask & warp.exited));
  if ((call.mask & warp.at_barrier) != 0) mismatch(call, thread_of(block, warp, call.mask & warp.at_barrier));
  Group* mine = nullptr;
  for (Group& group : warp) {
    if (group.call.mask == call.mask) {
      if (!same(group.call, call)) mismatch(call, thread_of(block, warp, group.arrived));
      mine = &group;
    } else if ((group.call.mask & bit) != 0 && (group.arrived & call.mask) != 0) {
      mismatch(call, thread_of(block, warp, group.arrived & call.mask));
    }
  }
  if (mine == nullptr) {
    mine = &warp.group[warp.groups++];
    *mine = {call, 0};
  }
  mine->arrived |= bit;
  wait(call);
  if (orders_memory) release(me.arrives);
  if (mine->arrived == call.mask) {
    *mine = warp.group[--warp.groups];
    complete(threads);
    for (unsigned lane = 0; lane < kLanes; ++lane) {
      if (call.mask >> lane & 1) {
        threads[lane].state = State::runs;
        if (orders_memory) acquire(threads[lane].arrives);
      }
    }
    if (orders_memory && under_tsan()) {
      for (unsigned lane = 0; lane < kLanes; ++lane) {
        if (call.mask >> lane & 1) release(threads[lane].wakes);
      }
    }
  }
  leave();
  if (orders_memory) acquire(me.wakes);
}

// Block or cluster: the rendezvous `call` of the current thread.
void meet_all(const Call& call) {
  Thread& me = *machine->current;
  Block& block = *me.block;
  const bool cluster = call.kind == Kind::cluster;
  Barrier& barrier = cluster ? machine->cluster_barrier : block.barrier;
  const auto others = [&](auto&& f) { for_each(cluster, block, f); };
  if ((cluster ? machine->exited : block.exited) != 0) {
    others([&](Thread& other) {
      if (other.state == State::exited) gone(call, other);
    });
  }
  if (barrier.arrived != 0 && !same(barrier.call, call)) {
    others([&](Thread& other) {
      if (&other != &me && other.state == State::waits && other.call.kind == call.kind) mismatch(call, other);
    });
  }
  if (cluster ? block.barrier.arrived != 0 : machine->cluster_barrier.arrived != 0) {
    for_each(false, block, [&](Thread& other) {  // who waits at the other barrier waits for me too
      const Kind kind = cluster ? Kind::block : Kind::cluster;
      if (other.state == State::waits && other.call.kind == kind) mismatch(call, other);
    });
  }
  for (const Group& group : warp_of(me)) {
    if (group.call.mask >> me.lane() & 1) mismatch(call, thread_of(block, warp_of(me), group.arrived));
  }
  barrier.call = call;
  ++barrier.arrived;
  warp_of(me).at_barrier |= 1u << me.lane();
  wait(call);
  release(barrier.arrives);
  char* const wakes = barrier.wakes[barrier.passed % 2];
  const auto threads = static_cast<unsigned>(machine->shape.block * (cluster ? machine->shape.cluster : 1));
  if (barrier.arrived == threads) {
    barrier.arrived = 0;
    ++barrier.passed;
    if (cluster) machine->cluster_met = true;
    others([](Thread& other) {
      other.state = State::runs;
      warp_of(other).at_barrier = 0;
    });
    acquire(barrier.arrives);
    release(wakes);
  }
  leave();
  acquire(wakes);
}

}  // namespace

// ---- For kernels -------------------------------------------------------------------------------------------------

void sync_block(Site site) { meet_all({Kind::block, 0, site, 0}); }
void sync_cluster(Site site) { meet_all({Kind::cluster, 0, site, 0}); }
void sync_warp(unsigned mask, Site site) {
  meet_lanes({Kind::warp, mask, site, 0}, true, [](Thread*) {});
}

bool any(unsigned mask, bool condition, Site site) {
  Thread& me = *machine->current;
  me.condition = condition;
  meet_lanes({Kind::vote, mask, site, 0}, false, [mask](Thread* threads) {
    bool result = false;
    for (int lane = 0; lane < kLanes; ++lane) result |= (mask >> lane & 1) != 0 && threads[lane].condition;
    for (int lane = 0; lane < kLanes; ++lane) {
      if (mask >> lane & 1) threads[lane].condition = result;
    }
  });
  return me.condition;
}

int lane() { return static_cast<int>(machine->current->lane()); }

void shuffle(unsigned mask, int source_lane, const std::uint32_t* in, std::uint32_t* out, int words, Site site) {
  Thread& me = *machine->current;
  if ((mask >> source_lane & 1) == 0) {
    fail(site, "shuffle from lane " + std::to_string(source_lane) + ", which is not in mask " + hex(mask));
  }
  me.source_lane = source_lane;
  me.in = in;
  me.out = out;
  meet_lanes({Kind::shuffle, mask, site, words}, false, [mask, words](Thread* threads) {
    const Unnoticed unnoticed;
    for (int lane = 0; lane < kLanes; ++lane) {
      if (mask >> lane & 1) std::copy_n(threads[threads[lane].source_lane].in, words, threads[lane].out);
    }
  });
}

// What an exit leaves undone.
void check_exit() {
  Thread& me = *machine->current;
  Block& block = *me.block;
  if (!me.copies.empty()) {
    const Site site = me.copies.front().site;
    fail(site, "exits without waiting for copy_async_16 at " + text(site));
  }
  for (const Group& group : warp_of(me)) {
    if (group.call.mask >> me.lane() & 1) {
      const Thread& other = thread_of(block, warp_of(me), group.arrived);
      fail(other.call.site, "exits, but thread " + std::to_string(other.index) + " waits for it: " + text(other.call));
    }
  }
  for (const Barrier* barrier : {&block.barrier, &machine->cluster_barrier}) {
    if (barrier->arrived != 0) {
      fail(barrier->call.site, "exits, but threads of its block or cluster wait for it: " + text(barrier->call));
    }
  }
}

}  // namespace lanenorm::on_host
