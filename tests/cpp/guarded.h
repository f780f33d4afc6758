// Memory that ends at a page boundary, or as close to it as malloc's alignment allows, followed by an inaccessible
// page. AddressSanitizer checks every access of plain code, but not gathers or masked loads and stores: out of bounds,
// these crash the process here.
#pragma once

#include <cstddef>
#include <memory>
#include <new>

#if defined(__unix__) && !defined(__SANITIZE_ADDRESS__)
#include <sys/mman.h>
#include <unistd.h>
#define NEUROADA_GUARDED
#endif

namespace neuroada::testing {

#ifdef NEUROADA_GUARDED

template <class T>
struct GuardedAllocator {
  using value_type = T;

  T* allocate(std::size_t count) const {
    const std::size_t bytes = round_up(count * sizeof(T), alignof(std::max_align_t)), whole = round_up(bytes, page());
    void* pages = mmap(nullptr, whole + page(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED) throw std::bad_alloc();
    char* guard = static_cast<char*>(pages) + whole;
    if (mprotect(guard, page(), PROT_NONE) != 0) throw std::bad_alloc();
    return reinterpret_cast<T*>(guard - bytes);
  }
  void deallocate(T* values, std::size_t count) const {
    const std::size_t bytes = round_up(count * sizeof(T), alignof(std::max_align_t)), whole = round_up(bytes, page());
    munmap(reinterpret_cast<char*>(values) + bytes - whole, whole + page());
  }

  bool operator==(const GuardedAllocator&) const { return true; }
  bool operator!=(const GuardedAllocator&) const { return false; }

 private:
  static std::size_t page() {
    static const auto bytes = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    return bytes;
  }
  static std::size_t round_up(std::size_t bytes, std::size_t step) { return (bytes + step - 1) / step * step; }
};

#else

template <class T>
using GuardedAllocator = std::allocator<T>;

#endif

}  // namespace neuroada::testing
