#include "block_cache.h"

#include <algorithm>
#include <chrono>
#include <mutex>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

// From LibTorch's stable ABI of 2.11 on: null under an older torch, where every output is allocated anew.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides, int64_t storage_offset, int32_t dtype,
    int32_t device_type, int32_t device_index, AtenTensorHandle* ret, int32_t layout, const uint8_t* opaque_metadata,
    int64_t opaque_metadata_size, void (*deleter)(void* data, void* context), void* context);

namespace normfused::binding {
namespace {

// Smaller outputs come from the C library's heap, which reuses them by itself.
constexpr int64_t kLeast = int64_t{1} << 20;
constexpr uintptr_t kHugePage = uintptr_t{1} << 21;
// A block serves requests down to 7/8 of its size.
bool fits(int64_t block, int64_t bytes) { return block >= bytes && block - block / 8 <= bytes; }

// Huge pages make page faults 512 times fewer. Advice only: what is not mapped there, or a kernel without huge pages,
// makes no difference. The range is rounded outwards: a block from malloc's heap shares its first and last huge page
// with its neighbours.
void advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const auto address = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = address & ~(kHugePage - 1);
  const uintptr_t end = (address + bytes + kHugePage - 1) & ~(kHugePage - 1);
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// The system may take these pages when it is short of memory, and until then they stay.
void offer_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_FREE)
  const auto address = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (address + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t end = (address + bytes) & ~(kHugePage - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_FREE);
#endif
}

int64_t default_limit() {
#if defined(__linux__)
  return static_cast<int64_t>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE) / 8;
#else
  return 0;
#endif
}

using Clock = std::chrono::steady_clock;
// Idle for less, a block is likely to be wanted again, and pages that were offered cost a little to take back.
constexpr Clock::duration kOfferAfter = std::chrono::seconds(1);

struct Block {
  Tensor memory;  // allocated by torch, so that its profiler sees the block
  void* data;
  int64_t bytes;
  Clock::time_point idle_since{};
  bool offered = false;
};

// Never waits for its lock: a child process that was forked while another thread held it would wait for ever.
class BlockCache {
 public:
  // Null if no idle block fits.
  Block* take(int64_t bytes) {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock) return nullptr;
    // The one that was freed last is the one that the processor's caches may still hold.
    const auto found =
        std::find_if(idle_.rbegin(), idle_.rend(), [&](const Block* b) { return fits(b->bytes, bytes); });
    if (found == idle_.rend()) return nullptr;
    Block* block = *found;
    idle_.erase(std::next(found).base());
    idle_bytes_ -= block->bytes;
    return block;
  }

  void put(Block* block) {
    std::vector<Block*> victims;
    if (const std::unique_lock lock(mutex_, std::try_to_lock); lock) {
      block->idle_since = Clock::now();
      block->offered = false;
      idle_.push_back(block);
      idle_bytes_ += block->bytes;
      victims = evict(limit_);
      offer_old(block->idle_since - kOfferAfter);
    } else {
      victims.push_back(block);
    }
    release(victims);
  }

  int64_t shrink(int64_t limit, bool keep) {
    std::vector<Block*> victims;
    {
      const std::lock_guard lock(mutex_);
      if (keep) limit_ = limit;
      victims = evict(limit);
    }
    return release(victims);
  }

 private:
  std::vector<Block*> evict(int64_t limit) {
    auto end = idle_.begin();
    while (end != idle_.end() && idle_bytes_ > limit) idle_bytes_ -= (*end++)->bytes;
    std::vector<Block*> victims(idle_.begin(), end);
    idle_.erase(idle_.begin(), end);
    return victims;
  }

  void offer_old(Clock::time_point until) {
    for (Block* block : idle_) {
      if (block->idle_since > until) return;
      if (!block->offered) offer_pages(block->data, block->bytes);
      block->offered = true;
    }
  }

  static int64_t release(const std::vector<Block*>& blocks) {
    int64_t bytes = 0;
    for (Block* block : blocks) {
      bytes += block->bytes;
      delete block;
    }
    return bytes;
  }

  std::mutex mutex_;
  std::vector<Block*> idle_;  // the oldest first
  int64_t idle_bytes_ = 0;
  int64_t limit_ = default_limit();
};

// Never destroyed: tensors may outlive every static object.
BlockCache& cache() {
  static BlockCache* const instance = new BlockCache;
  return *instance;
}

}  // namespace

Tensor empty_cached(const int64_t* sizes, const int64_t* strides, int64_t dim, ScalarType scalar_type,
                    const Tensor& like, int64_t bytes) {
  if (bytes < kLeast) return empty_strided(sizes, strides, dim, scalar_type, like);
  if (!torch_from_blob) {
    Tensor result = empty_strided(sizes, strides, dim, scalar_type, like);
    advise_huge_pages(result.mutable_data_ptr(), bytes);
    return result;
  }
  Block* block = cache().take(bytes);
  if (!block) {
    Tensor memory = empty_vector(bytes, ScalarType::Byte, like);
    void* data = memory.mutable_data_ptr();
    advise_huge_pages(data, bytes);
    block = new Block{std::move(memory), data, bytes};
  }
  AtenTensorHandle handle;
  const AOTITorchError error = torch_from_blob(
      block->data, dim, sizes, strides, 0, static_cast<int32_t>(scalar_type), 0, -1, &handle,
      aoti_torch_layout_strided(), nullptr, 0, [](void*, void* context) { cache().put(static_cast<Block*>(context)); },
      block);
  if (error != AOTI_TORCH_SUCCESS) delete block;
  TORCH_ERROR_CODE_CHECK(error);
  return Tensor(handle);
}

int64_t empty_cache() { return cache().shrink(0, false); }

void set_cache_limit(int64_t bytes) {
  check(bytes >= 0, "set_cache_limit", "bytes must not be negative, got ", bytes);
  cache().shrink(bytes, true);
}

}  // namespace normfused::binding
