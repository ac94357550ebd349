// Runs grids on the CPU, one fiber per thread. Threads of one launch never run at the same time; which one goes on is
// decided here, wherever a thread waits, so that a run can be repeated.
//
// Compiled without sanitizers, linked with or without. AddressSanitizer is told what of shared memory is accessible,
// ThreadSanitizer that every thread is one, ordered by barriers and atomics alone.
#include "../../csrc/kernels/cuda/device.cuh"
#include "fiber.h"

#include <deque>
#include <mutex>
#include <numeric>
#include <random>
#include <string>

// What the threads of a kernel that failed own is never freed.
extern "C" const char* __asan_default_options() { return "detect_leaks=0"; }

namespace normfused::emulator {
namespace {

constexpr unsigned kWarp = cuda::kWarp;
constexpr size_t kRedzone = 256;
constexpr size_t kSharedAlignment = 128;
constexpr unsigned char kPoison = 0xff;  // a NaN in every floating-point type
constexpr Status kInvalidConfiguration = 9, kInvalidDevice = 101, kCooperativeTooLarge = 720, kLaunchFailure = 719;

// --- Blocks ----------------------------------------------------------------------------------------------------------

struct Barrier {
  unsigned expected = 0, arrived = 0, phase = 0;
  Site site = {};
  char tokens[2];  // what ThreadSanitizer orders by: a fast thread is in the next phase already
};

struct Block;

struct Thread : Here {
  Block* home;
  unsigned warp;  // among those alive
  Fiber* fiber;   // null before the first step
  Site site;      // where it waits or last waited
  // The warp primitive it waits in.
  unsigned mask, source_lane;
  uint64_t value, result;
  // Copies in flight, oldest first, with the group of each.
  std::vector<std::pair<AsyncCopy, int>> copies;
  size_t copies_landed;
  int groups_closed;

  unsigned lane() const { return thread.x % kWarp; }
};

struct Warp {
  unsigned arrived = 0, exited = 0, phase = 0;
  char tokens[2];
};

struct Block : Coordinates {
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  unsigned first_warp;    // among those alive
  unsigned cluster_slot;  // of the first block of its cluster
  unsigned alive;
  Barrier barrier;
  Barrier cluster_barrier;  // the one of the cluster's first block serves
  char exit_token;
  size_t shared_bytes;
  std::vector<unsigned char> memory;  // shared memory between two redzones

  unsigned char* bytes() const { return static_cast<unsigned char*>(shared); }
};

bool same_place(const Site& a, const Site& b) {
  return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

std::string describe(const Site& site) {
  return std::string(site.primitive) + " (" + site.file + ":" + std::to_string(site.line) + ")";
}

std::string describe(const Thread& thread) {
  const Index& block = thread.block->index;
  return "thread " + std::to_string(thread.thread.x) + " of block (" + std::to_string(block.x) + ", " +
         std::to_string(block.y) + ")";
}

constexpr DeviceLimits kH200 = {
    .compute_capability = 90,
    .multiprocessors = 132,
    .threads_per_multiprocessor = 2048,
    .blocks_per_multiprocessor = 32,
    .shared_per_block = 227 << 10,
    .shared_per_multiprocessor = 228 << 10,
    .shared_reserved_per_block = 1 << 10,
    .max_cluster = 16,
    .l2_bytes = 50 << 20,
    .max_grid_x = 2147483647,
    .max_grid_y = 65535,
};

// --- The machine -----------------------------------------------------------------------------------------------------

class Machine {
 public:
  Status run(const void* kernel, const LaunchConfig& config, void (*body)(void*), void* context);

  void arrive(Barrier* barrier, unsigned first_warp, unsigned warps, const Site& site);
  uint64_t warp_exchange(WarpOperation operation, unsigned mask, unsigned source_lane, uint64_t value,
                         const Site& site);
  void yield(bool waiting);
  [[noreturn]] void fail(const std::string& what);

  Block& block(unsigned slot) { return blocks_[slot]; }
  unsigned warps_per_block() const { return config_.block / kWarp; }

  std::mutex mutex;
  Thread* current = nullptr;
  DeviceLimits limits = kH200;
  Schedule schedule = Schedule::together;
  uint64_t seed = 0;
  std::mt19937_64 random{0};
  std::vector<Launch> launches;
  std::string error;

 private:
  Status check(const LaunchConfig& config);
  Status refuse(Status status, const std::string& why);
  void start_block(unsigned slot, unsigned cluster, unsigned rank);
  void exit_thread();
  void exit_block(Block* block);

  Thread* pick(unsigned warp, unsigned lane);
  Thread* pick_after(const Thread& thread);
  Thread* next();
  void wait();
  void go_to(Thread* thread);
  std::string deadlock();

  Fiber* take_fiber();
  static void fiber_entry();
  [[noreturn]] void run_threads();

  LaunchConfig config_;
  void (*body_)(void*);
  void* context_;
  std::vector<unsigned> order_;  // of clusters
  std::deque<Block> blocks_;     // by slot; those alive begin at first_slot_
  unsigned first_slot_;
  std::vector<uint32_t> ready_;  // by warp among those alive: the lanes that can go on, the running one included
  unsigned alive_ = 0;           // threads
  uint64_t idle_turns_ = 0;      // yields since anything happened
  std::deque<Fiber> fibers_;
  std::vector<Fiber*> free_fibers_;
  Fiber main_;
  char launch_token_;
};

Machine machine;

// --- Threads on fibers

Fiber* Machine::take_fiber() {
  if (free_fibers_.empty()) {
    allocate(&fibers_.emplace_back());
    free_fibers_.push_back(&fibers_.back());
  }
  Fiber* fiber = free_fibers_.back();
  free_fibers_.pop_back();
  prepare(fiber, fiber_entry);
  return fiber;
}

void Machine::fiber_entry() {
  finish_switch(machine.current->fiber);
  machine.run_threads();
}

// Runs the current thread, then as many of those that have not begun as follow it: without a barrier, one stack serves
// a whole block.
void Machine::run_threads() {
  for (;;) {
    acquire(&launch_token_);
    body_(context_);
    exit_thread();
    Fiber* fiber = current->fiber;
    // ThreadSanitizer would take what two threads have on one stack for a race.
    if (!with_tsan()) free_fibers_.push_back(fiber);
    if (alive_ == 0) switch_fiber(fiber, &main_, /*for_good=*/true);
    Thread* thread = next();
    if (thread == nullptr) fail(deadlock());
    current = thread;
    if (thread->fiber != nullptr) switch_fiber(fiber, thread->fiber, /*for_good=*/true);
    thread->fiber = fiber;
    free_fibers_.pop_back();
  }
}

__forceinline__ void Machine::go_to(Thread* thread) {
  Thread* self = current;
  if (thread == self) return;
  if (thread->fiber == nullptr) thread->fiber = take_fiber();
  current = thread;
  switch_fiber(self->fiber, thread->fiber);
}

// --- Scheduling

// The first thread that can go on, from a lane of a warp onwards and around; null if there is none.
Thread* Machine::pick(unsigned warp, unsigned lane) {
  const unsigned warps = ready_.size();
  uint32_t ready = lane < kWarp ? ready_[warp] >> lane << lane : 0;
  for (unsigned step = 0; ready == 0; ++step) {
    if (step == warps) return nullptr;
    warp = warp + 1 < warps ? warp + 1 : 0;
    ready = ready_[warp];
  }
  Block& block = blocks_[first_slot_ + warp / warps_per_block()];
  return &block.threads[warp % warps_per_block() * kWarp + __builtin_ctz(ready)];
}

Thread* Machine::pick_after(const Thread& thread) { return pick(thread.warp, thread.lane() + 1); }

// The thread whose turn it is after the running one.
Thread* Machine::next() {
  const unsigned warps = ready_.size();
  if (schedule == Schedule::together) return pick_after(*current);
  if (schedule == Schedule::random) {
    const uint64_t bits = random();
    const unsigned warp = (bits >> 8) % warps, lane = bits % kWarp;
    return pick(warp, ready_[warp] >> lane ? lane : 0);
  }
  unsigned warp = current->warp;
  for (unsigned step = 0; step < warps && ready_[warp] == 0; ++step) {
    warp = seed % 2 ? (warp == 0 ? warps - 1 : warp - 1) : (warp + 1) % warps;
  }
  return pick(warp, 0);
}

// The running thread cannot go on before another one marks it as ready.
__forceinline__ void Machine::wait() {
  ready_[current->warp] &= ~(1u << current->lane());
  Thread* thread = next();
  if (thread == nullptr) fail(deadlock());
  go_to(thread);
}

void Machine::yield(bool waiting) {
  if (!waiting) {
    idle_turns_ = 0;
    if (schedule == Schedule::random) go_to(next());
    return;
  }
  // Far more turns than it takes for every thread to have had one.
  if (++idle_turns_ > 2048 * ready_.size()) fail("every thread that can go on waits for global memory to change");
  go_to(schedule == Schedule::random ? next() : pick_after(*current));
}

std::string Machine::deadlock() {
  std::string report = "deadlock:";
  unsigned exited = 0;
  const Thread* last = nullptr;
  for (unsigned slot = 0; slot < ready_.size() / warps_per_block(); ++slot) {
    for (const Thread& thread : blocks_[first_slot_ + slot].threads) {
      if (thread.home->warps[thread.thread.x / kWarp].exited >> thread.lane() & 1) {
        ++exited;
      } else if (last == nullptr || !same_place(last->site, thread.site)) {
        report += " " + describe(thread) + " waits in " + describe(thread.site) + ";";
        last = &thread;
      }
    }
  }
  return report + " " + std::to_string(exited) + " threads have exited";
}

void Machine::fail(const std::string& what) {
  error = std::string("kernel ") + config_.name + ": " + what;
  switch_fiber(current->fiber, &main_, /*for_good=*/true);
  std::abort();
}

// --- Barriers and warp primitives

void Machine::arrive(Barrier* barrier, unsigned first_warp, unsigned warps, const Site& site) {
  idle_turns_ = 0;
  if (barrier->arrived == 0) barrier->site = site;
  if (!same_place(barrier->site, site)) {
    fail(describe(*current) + " is at " + describe(site) + ", others wait at " + describe(barrier->site));
  }
  current->site = site;
  char* token = &barrier->tokens[barrier->phase % 2];
  release(token);
  if (++barrier->arrived < barrier->expected) {
    wait();
  } else {
    barrier->arrived = 0;
    ++barrier->phase;
    // No write of this thread's, though it may be done by a memset that ThreadSanitizer sees.
    if (with_tsan()) AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
    std::fill_n(ready_.begin() + first_warp, warps, ~0u);
    if (with_tsan()) AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    yield(/*waiting=*/false);
  }
  acquire(token);
}

uint64_t Machine::warp_exchange(WarpOperation operation, unsigned mask, unsigned source_lane, uint64_t value,
                                const Site& site) {
  idle_turns_ = 0;
  Thread& self = *current;
  const unsigned lane = self.lane();
  Warp& warp = self.home->warps[self.thread.x / kWarp];
  Thread* lanes = &self - lane;
  const auto fail_here = [&](const std::string& what) { fail(describe(self) + " in " + describe(site) + ": " + what); };
  if (!(mask >> lane & 1)) fail_here("the mask does not name the calling lane");
  if (mask & warp.exited) fail_here("the mask names a lane that has exited");
  if (const unsigned others = warp.arrived & mask) {
    const Thread& other = lanes[__builtin_ctz(others)];
    if (!same_place(other.site, site)) fail_here("another lane waits in " + describe(other.site));
    if (other.mask != mask) fail_here("another lane gives a different mask");
  }
  self.site = site;
  self.mask = mask;
  self.source_lane = source_lane;
  self.value = value;
  // Shuffles and ballots do not order memory.
  char* token = operation == WarpOperation::sync ? &warp.tokens[warp.phase % 2] : nullptr;
  if (token) release(token);
  warp.arrived |= 1u << lane;
  if ((warp.arrived & mask) != mask) {
    wait();
  } else {
    uint64_t ballot = 0;
    for (unsigned i = 0; i < kWarp; ++i) ballot |= uint64_t{(mask >> i & 1) && lanes[i].value != 0} << i;
    for (unsigned i = 0; i < kWarp; ++i) {
      if (!(mask >> i & 1)) continue;
      const unsigned source = lanes[i].source_lane;
      const uint64_t shuffled = mask >> source & 1 ? lanes[source].value : ~uint64_t{0};
      lanes[i].result = operation == WarpOperation::ballot ? ballot : shuffled;
    }
    warp.arrived &= ~mask;
    ++warp.phase;
    ready_[self.warp] |= mask;
    yield(/*waiting=*/false);
  }
  if (token) acquire(token);
  return self.result;
}

// --- Blocks and grids

void Machine::start_block(unsigned slot, unsigned cluster, unsigned rank) {
  while (blocks_.size() <= slot) blocks_.emplace_back();
  Block& block = blocks_[slot];
  const unsigned clusters_x = config_.grid_x / config_.cluster;
  block.index = {cluster % clusters_x * config_.cluster + rank, cluster / clusters_x, 0};
  block.dim = {config_.block, 1, 1};
  block.grid = {config_.grid_x, config_.grid_y, 1};
  block.cluster_rank = rank;
  block.cluster_size = config_.cluster;
  block.cluster_slot = slot - rank;
  block.first_warp = (slot - first_slot_) * warps_per_block();
  block.alive = config_.block;
  block.barrier.expected = config_.block;
  block.cluster_barrier.expected = config_.block * config_.cluster;
  block.barrier.arrived = block.cluster_barrier.arrived = 0;

  unpoison_for_asan(block.memory.data(), block.memory.size());
  block.shared_bytes = config_.shared_bytes;
  block.memory.assign(config_.shared_bytes + 2 * kRedzone + kSharedAlignment, kPoison);
  const auto start = reinterpret_cast<uintptr_t>(block.memory.data()) + kRedzone;
  block.shared = reinterpret_cast<void*>((start + kSharedAlignment - 1) / kSharedAlignment * kSharedAlignment);
  poison_for_asan(block.bytes() - kRedzone, kRedzone);
  poison_for_asan(block.bytes() + config_.shared_bytes, kRedzone);

  block.warps.assign(warps_per_block(), Warp{});
  block.threads.resize(config_.block);
  for (unsigned i = 0; i < config_.block; ++i) {
    Thread& thread = block.threads[i];
    thread.thread = {i, 0, 0};
    thread.block = thread.home = &block;
    thread.warp = block.first_warp + i / kWarp;
    thread.fiber = with_tsan() ? take_fiber() : nullptr;
    thread.copies.clear();
    thread.copies_landed = thread.groups_closed = 0;
  }
}

void Machine::exit_thread() {
  idle_turns_ = 0;
  Block& block = *current->home;
  if (!current->copies.empty()) fail(describe(*current) + " exits before its copies have landed");
  if (overflowed(*current->fiber)) fail("stack overflow");
  ready_[current->warp] &= ~(1u << current->lane());
  block.warps[current->thread.x / kWarp].exited |= 1u << current->lane();
  release(&block.exit_token);
  --alive_;
  if (--block.alive == 0) exit_block(&block);
}

void Machine::exit_block(Block* block) {
  acquire(&block->exit_token);
  unpoison_for_asan(block->bytes() - kRedzone, kRedzone);
  unpoison_for_asan(block->bytes() + config_.shared_bytes, kRedzone);
  const auto check_redzone = [&](int64_t begin) {
    for (int64_t offset = begin; offset < begin + int64_t{kRedzone}; ++offset) {
      if (block->bytes()[offset] == kPoison) continue;
      fail("a block wrote out of its shared memory, at byte " + std::to_string(offset));
    }
  };
  check_redzone(-int64_t{kRedzone});
  check_redzone(config_.shared_bytes);
  std::memset(block->shared, kPoison, config_.shared_bytes);
  poison_for_asan(block->memory.data(), block->memory.size());
}

Status Machine::refuse(Status status, const std::string& why) {
  error = std::string("launch of ") + config_.name + ": " + why;
  return status;
}

Status Machine::check(const LaunchConfig& config) {
  const uint64_t blocks = uint64_t{config.grid_x} * config.grid_y;
  if (config.block == 0 || config.block > 1024 || config.block % kWarp != 0) {
    return refuse(kInvalidConfiguration, "a block of " + std::to_string(config.block) + " threads");
  }
  if (blocks == 0 || config.grid_x > limits.max_grid_x || config.grid_y > limits.max_grid_y) {
    return refuse(kInvalidConfiguration,
                  "a grid of " + std::to_string(config.grid_x) + " x " + std::to_string(config.grid_y));
  }
  if (config.cluster == 0 || int(config.cluster) > limits.max_cluster || config.grid_x % config.cluster != 0) {
    return refuse(kInvalidConfiguration, "clusters of " + std::to_string(config.cluster));
  }
  if (config.shared_bytes > limits.shared_per_block) {
    return refuse(kInvalidConfiguration, std::to_string(config.shared_bytes) + " bytes of shared memory");
  }
  const uint64_t resident =
      std::min({size_t(limits.blocks_per_multiprocessor), size_t(limits.threads_per_multiprocessor / config.block),
                limits.shared_per_multiprocessor / (config.shared_bytes + limits.shared_reserved_per_block)});
  if (config.cooperative && blocks > resident * limits.multiprocessors) {
    return refuse(kCooperativeTooLarge, std::to_string(blocks) + " blocks cannot be resident at once");
  }
  return 0;
}

Status Machine::run(const void* kernel, const LaunchConfig& config, void (*body)(void*), void* context) {
  const std::lock_guard lock(mutex);
  config_ = config;
  if (const Status status = check(config)) return status;
  launches.push_back({kernel, config});
  body_ = body;
  context_ = context;
  error.clear();
  main_.tsan = with_tsan() ? __tsan_get_current_fiber() : nullptr;

  const unsigned clusters = config.grid_x / config.cluster * config.grid_y;
  order_.resize(clusters);
  std::iota(order_.begin(), order_.end(), 0);
  if (schedule == Schedule::warp) std::reverse(order_.begin(), order_.end());
  if (schedule == Schedule::random) std::shuffle(order_.begin(), order_.end(), random);

  const unsigned at_once = config.cooperative ? clusters : schedule == Schedule::random ? 1 + random() % 4 : 1;
  first_slot_ = 0;
  for (unsigned first = 0; first < clusters && error.empty(); first += at_once) {
    const unsigned resident = std::min(at_once, clusters - first) * config.cluster;
    ready_.assign(resident * warps_per_block(), ~0u);
    alive_ = resident * config.block;
    for (unsigned i = 0; i < resident; ++i) {
      start_block(first_slot_ + i, order_[first + i / config.cluster], i % config.cluster);
    }
    release(&launch_token_);
    const bool last_first = schedule == Schedule::warp && seed % 2;
    current = pick(last_first ? ready_.size() - 1 : 0, 0);
    if (current->fiber == nullptr) current->fiber = take_fiber();
    switch_fiber(&main_, current->fiber);
    // To ThreadSanitizer a thread or shared memory used again in the same launch would be the same one.
    if (with_tsan()) first_slot_ += resident;
  }
  acquire(&switch_token);
  if (!error.empty() || with_tsan()) {
    free_fibers_.clear();
    for (Fiber& fiber : fibers_) {
      unpoison_for_asan(fiber.stack, kStackBytes);
      free_fibers_.push_back(&fiber);
    }
  }
  return error.empty() ? 0 : kLaunchFailure;
}

}  // namespace

// --- The interface ---------------------------------------------------------------------------------------------------

void set_schedule(Schedule schedule, uint64_t seed) {
  machine.schedule = schedule;
  machine.seed = seed;
  machine.random.seed(seed);
}

void set_limits(const DeviceLimits& limits) { machine.limits = limits; }
const std::vector<Launch>& launches() { return machine.launches; }
void clear_launches() { machine.launches.clear(); }

const Here& here() { return *machine.current; }

Status run(const void* kernel, const LaunchConfig& config, void (*body)(void*), void* context) {
  return machine.run(kernel, config, body, context);
}

void block_barrier(Site site) {
  Block& block = *machine.current->home;
  machine.arrive(&block.barrier, block.first_warp, block.warps.size(), site);
}

void cluster_barrier(Site site) {
  Block& first = machine.block(machine.current->home->cluster_slot);
  machine.arrive(&first.cluster_barrier, first.first_warp, first.warps.size() * first.cluster_size, site);
}

uint64_t warp_exchange(WarpOperation operation, unsigned mask, unsigned source_lane, uint64_t value, Site site) {
  return machine.warp_exchange(operation, mask, source_lane, value, site);
}

void yield(bool waiting) { machine.yield(waiting); }

void* peer_shared(const void* shared, int rank, Site site) {
  const Block& block = *machine.current->home;
  const size_t offset = static_cast<const unsigned char*>(shared) - block.bytes();
  if (offset > block.shared_bytes) machine.fail(describe(site) + ": not an address in the block's shared memory");
  if (rank < 0 || rank >= int(block.cluster_size)) machine.fail(describe(site) + ": no rank " + std::to_string(rank));
  return machine.block(block.cluster_slot + rank).bytes() + offset;
}

void async_begin(AsyncCopy copy, Site site) {
  Thread& thread = *machine.current;
  const ptrdiff_t offset = static_cast<unsigned char*>(copy.destination) - thread.home->bytes();
  if (offset < 0 || offset + 16 > ptrdiff_t(thread.home->shared_bytes)) {
    machine.fail(describe(site) + ": not into the block's shared memory");
  }
  if (offset % 16 != 0 || reinterpret_cast<uintptr_t>(copy.source) % 16 != 0) {
    machine.fail(describe(site) + ": not aligned to 16 bytes");
  }
  thread.copies.push_back({copy, thread.groups_closed});
}

void async_close_group() { ++machine.current->groups_closed; }

bool async_next(int groups, AsyncCopy* copy) {
  Thread& thread = *machine.current;
  if (thread.copies_landed == thread.copies.size()) return false;
  const auto& [oldest, group] = thread.copies[thread.copies_landed];
  if (group >= thread.groups_closed - groups) return false;
  *copy = oldest;
  if (++thread.copies_landed == thread.copies.size()) {
    thread.copies.clear();
    thread.copies_landed = 0;
  }
  return true;
}

}  // namespace normfused::emulator

namespace normfused::cuda {

const char* runtime_message(Status status) { return status == 0 ? "no error" : emulator::machine.error.c_str(); }

Status current_device(int* device) {
  *device = 0;
  return 0;
}

Status device_limits(int device, DeviceLimits* limits) {
  *limits = emulator::machine.limits;
  return device == 0 ? 0 : emulator::kInvalidDevice;
}

}  // namespace normfused::cuda
