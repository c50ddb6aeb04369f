// The pages of the KV cache: which are free, and how many owners each of the others has.
//
// A page is only a number here; the tensors behind it are sglite/cache/kv_pool.py. Owners are
// running requests and the radix tree, and a page is shared by giving it one reference per owner
// (paged KV cache: Kwon et al. 2023, PagedAttention).
#pragma once

#include <cstdint>
#include <span>
#include <stdexcept>
#include <vector>

namespace sglite {

using PageId = std::int32_t;

class OutOfPages : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

// Free list and reference counts of pages 0 .. num_pages - 1. The first `num_reserved` are never
// given out: padded rows of a batch write there. Every call that throws has changed nothing.
//
// A reference can be marked as evictable: its owner would give it back at any moment. A page all of
// whose references are marked could be had for the asking, and the pool counts those pages as
// references come and go, so that "how much room is there" needs no walk over the tree.
class PagePool {
  public:
    explicit PagePool(std::int64_t num_pages, std::int64_t num_reserved = 1);

    // `count` pages with one reference each. Throws OutOfPages when fewer are free.
    std::vector<PageId> allocate(std::int64_t count);
    // One more reference for each page (a page named twice gets two). Only pages that are in use.
    void retain(std::span<const PageId> pages);
    // One reference less for each page; returns how many of them became free. Throws
    // std::invalid_argument for a page that has no reference left to give back.
    std::int64_t release(std::span<const PageId> pages);

    // Mark, or unmark, one of the references of each page as evictable.
    void mark_evictable(std::span<const PageId> pages);
    void unmark_evictable(std::span<const PageId> pages);

    std::int64_t num_pages() const { return static_cast<std::int64_t>(counts_.size()); }
    std::int64_t num_reserved() const { return num_reserved_; }
    std::int64_t num_free() const { return static_cast<std::int64_t>(free_.size()); }
    std::int64_t num_evictable() const { return num_evictable_; }
    // References of a page; 0 for a free or a reserved one. Throws std::out_of_range.
    std::int64_t ref_count(std::int64_t page) const;

  private:
    struct Count {
        std::int32_t references = 0;
        std::int32_t evictable = 0;  // of these, marked
        bool all_evictable() const { return references > 0 && references == evictable; }
    };

    Count& count_of(const char* caller, PageId page);
    void change(Count& count, std::int32_t references, std::int32_t evictable);

    std::vector<Count> counts_;
    std::vector<PageId>
        free_;  // used as a stack: the page freed last is the one most likely in a cache
    std::int64_t num_reserved_;
    std::int64_t num_evictable_ = 0;
};

}  // namespace sglite
