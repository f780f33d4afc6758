// An example of what check_symbols.cmake detects: a template outside the instruction set's namespace,
// not inlined.
namespace neuroada {

template <class T>
[[gnu::noinline]] T twice(T value) {
  return value + value;
}

namespace cpu::avx2 {
int leaky(int value) { return twice(value); }
}  // namespace cpu::avx2

}  // namespace neuroada
