#include "page_pool.h"

#include <limits>
#include <string>

namespace sglite {

PagePool::PagePool(std::int64_t num_pages, std::int64_t num_reserved)
    : num_reserved_(num_reserved) {
    if (num_reserved < 0) {
        throw std::invalid_argument("num_reserved is " + std::to_string(num_reserved) +
                                    "; it must be 0 or more");
    }
    if (num_pages <= num_reserved || num_pages > std::numeric_limits<PageId>::max()) {
        throw std::invalid_argument("num_pages is " + std::to_string(num_pages) +
                                    "; it must be more than num_reserved (" +
                                    std::to_string(num_reserved) + ") and fit in 31 bits");
    }
    counts_.resize(static_cast<std::size_t>(num_pages));
    free_.reserve(static_cast<std::size_t>(num_pages - num_reserved));
    for (std::int64_t page = num_pages - 1; page >= num_reserved; --page) {
        free_.push_back(static_cast<PageId>(page));  // lowest number on top
    }
}

PagePool::Count& PagePool::count_of(const char* caller, PageId page) {
    if (page < num_reserved_ || page >= num_pages()) {
        throw std::invalid_argument(std::string(caller) + ": page is " + std::to_string(page) +
                                    "; pages " + std::to_string(num_reserved_) + " to " +
                                    std::to_string(num_pages() - 1) + " are given out");
    }
    return counts_[static_cast<std::size_t>(page)];
}

void PagePool::change(Count& count, std::int32_t references, std::int32_t evictable) {
    num_evictable_ -= count.all_evictable();
    count.references += references;
    count.evictable += evictable;
    num_evictable_ += count.all_evictable();
}

std::vector<PageId> PagePool::allocate(std::int64_t count) {
    if (count < 0) {
        throw std::invalid_argument("allocate: count is " + std::to_string(count) +
                                    "; it must be 0 or more");
    }
    if (count > num_free()) {
        throw OutOfPages("allocate: " + std::to_string(count) + " pages asked for, " +
                         std::to_string(num_free()) + " of " + std::to_string(num_pages()) +
                         " are free");
    }
    std::vector<PageId> pages(free_.rbegin(), free_.rbegin() + count);
    free_.resize(free_.size() - static_cast<std::size_t>(count));
    for (PageId page : pages) {
        change(counts_[static_cast<std::size_t>(page)], 1, 0);
    }
    return pages;
}

void PagePool::retain(std::span<const PageId> pages) {
    for (PageId page : pages) {  // all are checked before the first is changed
        if (count_of("retain", page).references == 0) {
            throw std::invalid_argument("retain: page " + std::to_string(page) +
                                        " is free; only pages in use can get another owner");
        }
    }
    for (PageId page : pages) {
        change(counts_[static_cast<std::size_t>(page)], 1, 0);
    }
}

std::int64_t PagePool::release(std::span<const PageId> pages) {
    const std::size_t free_before = free_.size();
    std::size_t done = 0;
    try {
        for (; done < pages.size(); ++done) {
            Count& count = count_of("release", pages[done]);
            if (count.references == 0) {
                throw std::invalid_argument("release: page " + std::to_string(pages[done]) +
                                            " is free already");
            }
            // Marked references belong to the tree, which unmarks before it releases.
            if (count.references == count.evictable) {
                throw std::invalid_argument("release: page " + std::to_string(pages[done]) +
                                            " is only held by the prefix cache");
            }
            change(count, -1, 0);
            if (count.references == 0) {
                free_.push_back(pages[done]);
            }
        }
    } catch (...) {
        // A page may be named more than once, so nothing short of doing it tells whether it can be
        // done.
        for (PageId page : pages.first(done)) {
            change(counts_[static_cast<std::size_t>(page)], 1, 0);
        }
        free_.resize(free_before);
        throw;
    }
    return static_cast<std::int64_t>(free_.size() - free_before);
}

void PagePool::mark_evictable(std::span<const PageId> pages) {
    for (PageId page : pages) {
        change(count_of("mark_evictable", page), 0, 1);
    }
}

void PagePool::unmark_evictable(std::span<const PageId> pages) {
    for (PageId page : pages) {
        change(count_of("unmark_evictable", page), 0, -1);
    }
}

std::int64_t PagePool::ref_count(std::int64_t page) const {
    if (page < 0 || page >= num_pages()) {
        throw std::out_of_range("ref_count: page is " + std::to_string(page) + "; there are " +
                                std::to_string(num_pages()) + " pages");
    }
    return counts_[static_cast<std::size_t>(page)].references;
}

}  // namespace sglite
