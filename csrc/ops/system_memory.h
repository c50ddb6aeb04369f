// What the system is told about memory. One that declines is only slower.
#pragma once

#include "tensor.h"

namespace sglite::ops {

// Asks for large pages behind new storage: it is then filled several times faster, since fewer
// pages have to be made, and read faster, since their addresses fit the processor's tables.
void advise_huge_pages(const Tensor& storage);

// Has all of a file's contents mapped, which would else be done page by page, as each is first
// read. Takes as long as that; reads what is not in memory.
void map_pages(const Tensor& contents);

// Gives back the memory behind a mapped file's contents. Pages at both ends may hold something
// else, too, and stay.
void give_back_pages(const void* contents, int64_t bytes);

}  // namespace sglite::ops
