// The prefix cache: a radix tree from sequences of 64-bit keys to the pages that hold their KV.
//
// Radix tree over prompts: Zheng et al. 2024 (RadixAttention). Here an edge may begin and end
// anywhere, not only at page borders, so that a prefix is reused to the token.
//
// A node covers the tokens [begin, end) of its path and owns the keys of these. Its pages follow
// one rule, for a page size P:
//
//     a page belongs to the node in which the page's last cached token lies: a node holds the pages
//     begin / P .. end / P - 1 (integer division), and a leaf that ends inside a page holds that
//     one too.
//
// So the pages of a path are the pages of its nodes, one after the other; every page is held once;
// and a node's tail inside a page is found in the first page of any of its children, because
// whoever continues a path inside a page does so in a page that holds all of that page's tokens:
// its own page while it goes on writing, or a copy (copy on write) when it is somebody else.
//
//     page size 4   [ a b c d e f ]            leaf, pages 7 (abcd) and 8 (ef)
//     then abcdegh, pages 7 and 9 (egh):
//                   [ a b c d e ]              page 7; "e" is in 8 and in 9
//                     |- [ f ]                 page 8 (ef)
//                     '- [ g h ]               page 9 (egh)
//
// Locks. A request that runs holds a lock on the prefix it uses, and a locked node is not evicted.
// A lock ends at a page border and covers only pages that its request holds as well. It follows
// that any page is free, evictable, reserved or held by a running request: the cache never stands
// in the way of a request, not even of the one that holds the lock, and a request that fits into
// the pool alone can always run.
//
// Growth. A request is inserted again after every chunk of its prefill, each time longer. A leaf
// that nobody has locked is extended in place; anything else gets a child; and when a lock moves
// down from a node that has one child only, the two become one. A request that grows alone is thus
// two nodes however many chunks it came in: one up to its lock, and one for the rest of the last
// page.
//
// Eviction takes leaves that are not locked, the one accessed longest ago first (a logical clock,
// and a set ordered by it), and cuts them from the end, page by page: a long prompt loses its tail
// before its head.
//
// Not thread-safe: the caller serialises (from Python, the GIL does).
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "page_pool.h"

namespace sglite {

using Key = std::int64_t;
using LockId = std::int64_t;  // never used again after unlock(): a stale one is noticed

struct PrefixMatch {
    std::int64_t num_tokens = 0;
    std::vector<PageId> pages;  // the whole pages: num_tokens / page_size of them
    PageId partial_page = -1;   // holds the other num_tokens % page_size tokens; -1: there are none
    LockId lock = -1;           // -1: not locked
};

// One node as tests and debuggers see it.
struct NodeView {
    std::string space;
    std::int64_t parent;  // index in the list of nodes; -1 below the root of a namespace
    std::int64_t begin;
    std::vector<Key> keys;
    std::vector<PageId> pages;
    std::int64_t num_locks;  // locks that end at this node
    bool locked;             // one ends here or below
    std::uint64_t last_access;
};

class RadixTree {
  public:
    RadixTree(std::shared_ptr<PagePool> pool, std::int64_t page_size);
    ~RadixTree();
    RadixTree(const RadixTree&) = delete;
    RadixTree& operator=(const RadixTree&) = delete;

    // The longest cached prefix of `keys` in a namespace. Looks only: the pages are not retained,
    // and are good until the tree changes.
    PrefixMatch match(const std::string& space, std::span<const Key> keys) const;

    // The same for use: all its pages get a reference for the caller, who gives them back to the
    // pool, and the prefix is locked up to its last whole page until unlock(). The page that is
    // only partly valid is for copying, and the caller gives it back after that.
    PrefixMatch lock(const std::string& space, std::span<const Key> keys);
    void unlock(LockId lock);

    // Cache `keys`, whose KV is in `pages` (exactly as many as it takes). What the tree already has
    // stays as it is; only for the rest does the tree take references. Returns how many tokens it
    // had already. A lock given moves down to the last page border up to which the tree's pages are
    // the caller's. From then on the caller may write after the last of `keys`, but no more change
    // what was inserted.
    std::int64_t insert(const std::string& space, std::span<const Key> keys,
                        std::span<const PageId> pages, std::optional<LockId> lock = {});

    // Cut leaves until `num_pages` pages became free or nothing is left to cut. Returns how many
    // became free, which is not every page that was cut: some may be held by a request as well.
    std::int64_t evict(std::int64_t num_pages);
    // Drop all that is not locked, of one namespace or of all. Returns how many pages became free.
    std::int64_t clear(const std::optional<std::string>& space = {});

    std::int64_t page_size() const { return page_size_; }
    std::int64_t num_tokens() const { return num_tokens_; }
    std::int64_t num_pages() const { return num_pages_; }
    std::int64_t num_locks() const { return static_cast<std::int64_t>(locks_.size()); }
    // Namespaces that hold something or are locked; an empty one costs nothing.
    std::int64_t num_namespaces() const { return static_cast<std::int64_t>(roots_.size()); }
    // How many pages evict() could free now.
    std::int64_t num_evictable_pages() const { return pool_->num_evictable(); }
    std::vector<NodeView> nodes() const;

  private:
    struct Node;
    struct Walk {
        Node* node;  // holds the last token matched; the root if none is; null without a root
        std::int64_t depth;  // tokens matched
    };
    struct OlderFirst {
        bool operator()(const Node* a, const Node* b) const;
    };

    Walk walk(const std::string& space, std::span<const Key> keys) const;
    PrefixMatch describe(const Walk& found) const;
    std::vector<PageId> path_pages(const Node* node, std::int64_t count) const;
    PageId page_inside(const Node* node, std::int64_t index) const;
    Node* locked_node(LockId lock) const;
    std::int64_t own_pages(const Node* node, std::span<const PageId> pages,
                           std::int64_t count) const;

    Node* split(Node* node, std::int64_t depth);
    Node* node_ending_at(Node* node, std::int64_t depth);
    Node* append(Node* node, std::int64_t depth, std::span<const Key> keys,
                 std::span<const PageId> pages);
    void absorb_child(Node* node);
    std::int64_t cut(Node* leaf, std::int64_t wanted);
    void drop_if_empty(Node* root);
    void touch(Node* node);
    void add_lock(Node* node);
    void remove_lock(Node* node);
    void move_lock(LockId lock, Node* from, Node* to);

    std::shared_ptr<PagePool> pool_;
    std::int64_t page_size_;
    std::unordered_map<std::string, std::unique_ptr<Node>> roots_;
    std::unordered_map<LockId, Node*> locks_;
    std::set<Node*, OlderFirst> evictable_leaves_;
    LockId last_lock_ = 0;
    std::uint64_t clock_ = 0;
    std::int64_t num_tokens_ = 0;
    std::int64_t num_pages_ = 0;
};

}  // namespace sglite
