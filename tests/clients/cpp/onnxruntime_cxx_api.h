// Declarations of the calls that a bundle's C++ makes, with the types of ONNX Runtime's C++ API: enough for a compiler
// to check them where the real header is not to be had. Nothing here computes.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#define ORTCHAR_T char
enum OrtAllocatorType { OrtInvalidAllocator = -1, OrtDeviceAllocator = 0, OrtArenaAllocator = 1 };
enum OrtMemType { OrtMemTypeCPUInput = -2, OrtMemTypeCPUOutput = -1, OrtMemTypeDefault = 0 };
enum OrtLoggingLevel { ORT_LOGGING_LEVEL_VERBOSE, ORT_LOGGING_LEVEL_INFO, ORT_LOGGING_LEVEL_WARNING };

namespace Ort {
struct Env {
  Env(OrtLoggingLevel = ORT_LOGGING_LEVEL_WARNING, const char* = "") {}
  Env(const Env&) = delete;
};
struct SessionOptions {
  SessionOptions() = default;
  SessionOptions(SessionOptions&&) = default;
  SessionOptions& SetIntraOpNumThreads(int) { return *this; }
  SessionOptions& AddConfigEntry(const char*, const char*) { return *this; }
};
struct RunOptions {
  explicit RunOptions(std::nullptr_t) {}
};
struct MemoryInfo {
  static MemoryInfo CreateCpu(OrtAllocatorType, OrtMemType) { return {}; }
};
struct Value {
  explicit Value(std::nullptr_t) {}
  Value(Value&&) = default;
  Value(const Value&) = delete;
  template <typename T>
  static Value CreateTensor(const MemoryInfo&, T*, size_t, const int64_t*, size_t) {
    return Value{nullptr};
  }
  template <typename T>
  const T* GetTensorData() const {
    return nullptr;
  }
};
struct Session {
  Session(const Env&, const ORTCHAR_T*, const SessionOptions&) {}
  std::vector<Value> Run(const RunOptions&, const char* const*, const Value*, size_t, const char* const*, size_t) {
    return {};
  }
};
}  // namespace Ort
