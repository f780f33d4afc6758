// The whole test framework: a check that reports a failure and continues, and the exit status.
#pragma once

#include <cstdio>
#include <string>

namespace neuroada::testing {

inline int failures = 0;

inline void fail(const char* file, int line, const char* condition, const std::string& message) {
  constexpr int kPrinted = 20;
  if (++failures <= kPrinted) std::fprintf(stderr, "%s:%d: %s is false: %s\n", file, line, condition, message.c_str());
}

inline int exit_status() {
  if (failures > 0) std::fprintf(stderr, "%d checks failed\n", failures);
  return failures > 0;
}

}  // namespace neuroada::testing

// The message, any expression that makes a string, is evaluated only on failure.
#define CHECK(condition, message)                                                         \
  do {                                                                                    \
    if (!(condition)) ::neuroada::testing::fail(__FILE__, __LINE__, #condition, message); \
  } while (false)
