#include "radix_tree.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <utility>

namespace sglite {

struct RadixTree::Node {
    Node* parent = nullptr;  // null: the root of a namespace, which covers no token
    std::int64_t begin = 0;
    std::vector<Key> keys;
    std::vector<PageId> pages;
    std::unordered_map<Key, std::unique_ptr<Node>> children;  // by the first key of each
    std::int64_t num_locks = 0;                               // locks that end here
    std::int64_t num_locked_children = 0;
    std::uint64_t last_access = 0;

    std::int64_t end() const { return begin + static_cast<std::int64_t>(keys.size()); }
    bool locked() const { return num_locks + num_locked_children > 0; }
    bool evictable_leaf() const { return parent && children.empty() && !locked(); }
};

// Leaves accessed by the same operation do not exist (one operation walks one path), so the address
// only decides between nodes of which at most one is in the set.
bool RadixTree::OlderFirst::operator()(const Node* a, const Node* b) const {
    return std::pair(a->last_access, a) < std::pair(b->last_access, b);
}

namespace {

std::size_t common_prefix(std::span<const Key> a, std::span<const Key> b) {
    const std::size_t length = std::min(a.size(), b.size());
    constexpr std::size_t kBlock = 512;
    std::size_t i = 0;
    // memcmp compares whole vectors of keys at once; the last block says where exactly they part.
    while (i + kBlock <= length && std::memcmp(&a[i], &b[i], kBlock * sizeof(Key)) == 0) {
        i += kBlock;
    }
    while (i < length && a[i] == b[i]) {
        ++i;
    }
    return i;
}

}  // namespace

RadixTree::RadixTree(std::shared_ptr<PagePool> pool, std::int64_t page_size)
    : pool_(std::move(pool)), page_size_(page_size) {
    if (!pool_) {
        throw std::invalid_argument("pool is missing");
    }
    if (page_size < 1) {
        throw std::invalid_argument("page_size is " + std::to_string(page_size) +
                                    "; it must be 1 or more");
    }
}

RadixTree::~RadixTree() {
    // Node by node, since a chain of nodes can be longer than the stack is deep.
    std::vector<std::unique_ptr<Node>> pending;
    for (auto& [space, root] : roots_) {
        pending.push_back(std::move(root));
    }
    while (!pending.empty()) {
        std::unique_ptr<Node> node = std::move(pending.back());
        pending.pop_back();
        for (auto& [key, child] : node->children) {
            pending.push_back(std::move(child));
        }
        try {
            if (!node->locked()) {
                pool_->unmark_evictable(node->pages);
            }
            pool_->release(node->pages);
        } catch (const std::invalid_argument&) {
            // Somebody released pages that were ours. The pool has been wrong since then, and
            // ending the whole process from a destructor would not mend it.
        }
    }
}

// ---- looking ------------------------------------------------------------------------------------

RadixTree::Walk RadixTree::walk(const std::string& space, std::span<const Key> keys) const {
    const auto root = roots_.find(space);
    if (root == roots_.end()) {
        return {nullptr, 0};
    }
    Node* node = root->second.get();
    std::size_t depth = 0;
    while (depth < keys.size()) {
        const auto child = node->children.find(keys[depth]);
        if (child == node->children.end()) {
            break;
        }
        node = child->second.get();
        depth += common_prefix(node->keys, keys.subspan(depth));
        if (static_cast<std::int64_t>(depth) < node->end()) {
            break;
        }
    }
    return {node, static_cast<std::int64_t>(depth)};
}

// The first `count` pages of the path that ends in `node`.
std::vector<PageId> RadixTree::path_pages(const Node* node, std::int64_t count) const {
    std::vector<PageId> pages(static_cast<std::size_t>(count));
    for (; node && node->parent; node = node->parent) {
        const std::int64_t first = node->begin / page_size_;
        const std::int64_t held = static_cast<std::int64_t>(node->pages.size());
        const std::int64_t wanted = std::clamp<std::int64_t>(count - first, 0, held);
        std::copy_n(node->pages.begin(), wanted, pages.begin() + std::min(first, count));
    }
    return pages;
}

// The page with number `index` on a path that ends in `node` or goes on below it inside that page.
PageId RadixTree::page_inside(const Node* node, std::int64_t index) const {
    const auto offset = [&] { return static_cast<std::size_t>(index - node->begin / page_size_); };
    while (offset() >= node->pages.size()) {
        node = node->children.begin()->second.get();  // not a leaf: a leaf holds its last page
    }
    return node->pages[offset()];
}

PrefixMatch RadixTree::describe(const Walk& found) const {
    PrefixMatch match;
    match.num_tokens = found.depth;
    match.pages = path_pages(found.node, found.depth / page_size_);
    if (found.depth % page_size_ != 0) {
        match.partial_page = page_inside(found.node, found.depth / page_size_);
    }
    return match;
}

PrefixMatch RadixTree::match(const std::string& space, std::span<const Key> keys) const {
    return describe(walk(space, keys));
}

std::vector<NodeView> RadixTree::nodes() const {
    std::vector<NodeView> views;
    for (const auto& [space, root] : roots_) {
        std::vector<std::pair<const Node*, std::int64_t>> pending{{root.get(), -1}};
        while (!pending.empty()) {
            const auto [node, parent] = pending.back();
            pending.pop_back();
            std::int64_t index = -1;
            if (node->parent) {
                index = static_cast<std::int64_t>(views.size());
                views.push_back({space, parent, node->begin, node->keys, node->pages,
                                 node->num_locks, node->locked(), node->last_access});
            }
            for (const auto& [key, child] : node->children) {
                pending.emplace_back(child.get(), index);
            }
        }
    }
    return views;
}

// ---- changing the shape -------------------------------------------------------------------------

// Cut `node` in two at `depth`, inside it; returns the upper part. `node` itself becomes the lower
// part, so that the locks that end in it still end where they did.
RadixTree::Node* RadixTree::split(Node* node, std::int64_t depth) {
    const auto keys = node->keys.begin() + (depth - node->begin);
    const auto pages = node->pages.begin() + (depth / page_size_ - node->begin / page_size_);
    auto made = std::make_unique<Node>();
    Node* upper = made.get();
    upper->parent = node->parent;
    upper->begin = node->begin;
    upper->keys.assign(node->keys.begin(), keys);
    upper->pages.assign(node->pages.begin(), pages);
    upper->num_locked_children = node->locked();
    upper->last_access = node->last_access;

    std::unique_ptr<Node>& slot = node->parent->children.at(node->keys.front());
    upper->children.emplace(*keys, std::move(slot));
    slot = std::move(made);
    node->parent = upper;
    node->begin = depth;
    node->keys.erase(node->keys.begin(), keys);
    node->pages.erase(node->pages.begin(), pages);
    return upper;
}

// The node that ends at `depth` on the path to `node`, made by a split where there is none yet.
RadixTree::Node* RadixTree::node_ending_at(Node* node, std::int64_t depth) {
    while (node->parent && node->begin >= depth) {
        node = node->parent;
    }
    return node->end() > depth ? split(node, depth) : node;
}

// Let the path that ends at `depth` in `node` go on with `keys`; returns the leaf. `pages` begins
// with the page that holds position `depth`; the caller has retained them for the tree.
RadixTree::Node* RadixTree::append(Node* node, std::int64_t depth, std::span<const Key> keys,
                                   std::span<const PageId> pages) {
    node = node_ending_at(node, depth);
    if (!node->evictable_leaf()) {
        auto child = std::make_unique<Node>();
        child->parent = node;
        child->begin = depth;
        node = node->children.emplace(keys[0], std::move(child)).first->second.get();
    } else if (depth % page_size_ != 0) {
        // The leaf's last page gives way to the one in which the path goes on.
        const PageId replaced = node->pages.back();
        node->pages.pop_back();
        --num_pages_;
        pool_->unmark_evictable({&replaced, 1});
        pool_->release({&replaced, 1});
    }
    node->keys.insert(node->keys.end(), keys.begin(), keys.end());
    node->pages.insert(node->pages.end(), pages.begin(), pages.end());
    pool_->mark_evictable(pages);
    num_tokens_ += static_cast<std::int64_t>(keys.size());
    num_pages_ += static_cast<std::int64_t>(pages.size());
    return node;
}

// Make one node of `node` and its only child. Both are locked or neither is, as no lock ends in
// `node`.
void RadixTree::absorb_child(Node* node) {
    const std::unique_ptr<Node> child = std::move(node->children.begin()->second);
    node->children = std::move(child->children);
    for (auto& [key, grandchild] : node->children) {
        grandchild->parent = node;
    }
    node->keys.insert(node->keys.end(), child->keys.begin(), child->keys.end());
    node->pages.insert(node->pages.end(), child->pages.begin(), child->pages.end());
    node->num_locks = child->num_locks;
    node->num_locked_children = child->num_locked_children;
}

// Take pages from the end of a leaf until `wanted` became free, and the leaf itself with its last
// one. Returns how many became free.
std::int64_t RadixTree::cut(Node* leaf, std::int64_t wanted) {
    const Key first_key = leaf->keys.front();
    Node* parent = leaf->parent;
    std::int64_t freed = 0;
    while (freed < wanted && !leaf->pages.empty()) {
        const PageId page = leaf->pages.back();
        leaf->pages.pop_back();
        const auto index = leaf->begin / page_size_ + static_cast<std::int64_t>(leaf->pages.size());
        const std::int64_t end = std::max(index * page_size_, leaf->begin);
        num_tokens_ -= leaf->end() - end;
        leaf->keys.resize(static_cast<std::size_t>(end - leaf->begin));
        if (leaf->keys.empty() && leaf->begin % page_size_ != 0 && parent->children.size() == 1) {
            // The parent ends inside this page and becomes a leaf: it holds the page from now on.
            // It is not locked either, since locks end at page borders, so the page stays marked.
            parent->pages.push_back(page);
        } else {
            --num_pages_;
            pool_->unmark_evictable({&page, 1});
            freed += pool_->release({&page, 1});
        }
    }
    if (leaf->keys.empty()) {
        evictable_leaves_.erase(leaf);
        parent->children.erase(first_key);
        if (parent->evictable_leaf()) {
            evictable_leaves_.insert(parent);
        }
        drop_if_empty(parent);
    }
    return freed;
}

void RadixTree::drop_if_empty(Node* root) {
    if (!root->parent && root->children.empty() && !root->locked()) {
        std::erase_if(roots_, [&](const auto& entry) { return entry.second.get() == root; });
    }
}

// ---- locks and the order of access --------------------------------------------------------------

void RadixTree::touch(Node* node) {
    ++clock_;
    for (; node; node = node->parent) {
        evictable_leaves_.erase(node);
        node->last_access = clock_;
        if (node->evictable_leaf()) {
            evictable_leaves_.insert(node);
        }
    }
}

void RadixTree::add_lock(Node* node) {
    bool was_locked = node->locked();
    ++node->num_locks;
    while (!was_locked) {  // upwards, as far as this lock is the first
        evictable_leaves_.erase(node);
        pool_->unmark_evictable(node->pages);
        node = node->parent;
        if (!node) {
            return;
        }
        was_locked = node->locked();
        ++node->num_locked_children;
    }
}

void RadixTree::remove_lock(Node* node) {
    --node->num_locks;
    while (!node->locked()) {  // upwards, as far as this lock was the last
        pool_->mark_evictable(node->pages);
        if (node->evictable_leaf()) {
            evictable_leaves_.insert(node);
        }
        if (!node->parent) {
            drop_if_empty(node);
            return;
        }
        node = node->parent;
        --node->num_locked_children;
    }
}

void RadixTree::move_lock(LockId lock, Node* from, Node* to) {
    if (from == to) {
        return;
    }
    add_lock(to);  // first: what both cover then stays locked and is not gone through
    remove_lock(from);
    if (from->parent && from->num_locks == 0 && from->children.size() == 1) {
        Node* child = from->children.begin()->second.get();
        if (child->num_locks == (child == to)) {  // no other lock would lose its node
            absorb_child(from);
            to = child == to ? from : to;
        }
    }
    locks_[lock] = to;
}

RadixTree::Node* RadixTree::locked_node(LockId lock) const {
    const auto found = locks_.find(lock);
    if (found == locks_.end()) {
        throw std::invalid_argument("lock " + std::to_string(lock) +
                                    " is not held (given back already, or never given out)");
    }
    return found->second;
}

// How many of the path's first `count` pages are the same as in `pages`.
std::int64_t RadixTree::own_pages(const Node* node, std::span<const PageId> pages,
                                  std::int64_t count) const {
    const std::vector<PageId> held = path_pages(node, count);
    return std::mismatch(held.begin(), held.end(), pages.begin()).first - held.begin();
}

// ---- public changes -----------------------------------------------------------------------------

PrefixMatch RadixTree::lock(const std::string& space, std::span<const Key> keys) {
    Walk walked = walk(space, keys);
    PrefixMatch found = describe(walked);
    pool_->retain(found.pages);
    if (found.partial_page >= 0) {
        pool_->retain({&found.partial_page, 1});
    }
    if (!walked.node) {
        walked.node = (roots_[space] = std::make_unique<Node>()).get();
    }
    touch(walked.node);
    Node* node =
        node_ending_at(walked.node, static_cast<std::int64_t>(found.pages.size()) * page_size_);
    add_lock(node);
    found.lock = ++last_lock_;
    locks_[found.lock] = node;
    return found;
}

void RadixTree::unlock(LockId lock) {
    Node* node = locked_node(lock);
    locks_.erase(lock);
    remove_lock(node);
}

std::int64_t RadixTree::insert(const std::string& space, std::span<const Key> keys,
                               std::span<const PageId> pages, std::optional<LockId> lock) {
    const auto length = static_cast<std::int64_t>(keys.size());
    const std::int64_t needed = (length + page_size_ - 1) / page_size_;
    if (static_cast<std::int64_t>(pages.size()) != needed) {
        throw std::invalid_argument("insert: pages has " + std::to_string(pages.size()) +
                                    " entries; " + std::to_string(length) + " keys take " +
                                    std::to_string(needed) + " pages of " +
                                    std::to_string(page_size_));
    }
    Node* from = lock ? locked_node(*lock) : nullptr;
    Walk found = walk(space, keys);
    if (from) {
        const Node* above = found.node;
        while (above && above->end() > from->end()) {
            above = above->parent;
        }
        const std::int64_t locked_pages = from->end() / page_size_;
        if (above != from || found.depth < from->end() ||
            own_pages(from, pages, locked_pages) != locked_pages) {
            throw std::invalid_argument("insert: keys and pages do not begin with the " +
                                        std::to_string(from->end()) + " tokens that lock " +
                                        std::to_string(*lock) + " covers");
        }
    }
    if (length == 0) {
        return 0;
    }
    if (found.depth < length) {
        const auto rest = pages.subspan(static_cast<std::size_t>(found.depth / page_size_));
        pool_->retain(rest);  // may throw; nothing has changed so far
        if (!found.node) {
            found.node = (roots_[space] = std::make_unique<Node>()).get();
        }
        found.node = append(found.node, found.depth,
                            keys.subspan(static_cast<std::size_t>(found.depth)), rest);
    }
    touch(found.node);
    if (from) {
        const std::int64_t own = own_pages(found.node, pages, length / page_size_);
        move_lock(*lock, from, node_ending_at(found.node, own * page_size_));
    }
    return found.depth;
}

std::int64_t RadixTree::evict(std::int64_t num_pages) {
    if (num_pages < 0) {
        throw std::invalid_argument("evict: num_pages is " + std::to_string(num_pages) +
                                    "; it must be 0 or more");
    }
    std::int64_t freed = 0;
    while (freed < num_pages && !evictable_leaves_.empty()) {
        freed += cut(*evictable_leaves_.begin(), num_pages - freed);
    }
    return freed;
}

std::int64_t RadixTree::clear(const std::optional<std::string>& space) {
    std::vector<Node*> nodes;  // parents before children
    for (const auto& [name, root] : roots_) {
        if (space && name != *space) {
            continue;
        }
        for (const auto& [key, child] : root->children) {
            nodes.push_back(child.get());
        }
    }
    for (std::size_t i = 0; i < nodes.size(); ++i) {
        for (const auto& [key, child] : nodes[i]->children) {
            nodes.push_back(child.get());
        }
    }
    std::int64_t freed = 0;
    for (auto node = nodes.rbegin(); node != nodes.rend(); ++node) {
        if ((*node)->evictable_leaf()) {
            freed += cut(*node, std::numeric_limits<std::int64_t>::max());
        }
    }
    return freed;
}

}  // namespace sglite
