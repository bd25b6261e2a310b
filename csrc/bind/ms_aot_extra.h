// The object through which MindSpore's AOT custom ops hand over attributes.
//
// Same virtual table and layout as AotExtra of MindSpore's own utils/custom_aot_extra.h (2.x),
// which can't be used: it includes half of MindSpore, and its Attr<T>() is a stub. std::string
// crosses here, and MindSpore is built with the old one: compile with -D_GLIBCXX_USE_CXX11_ABI=0.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace codellama_rt {

// Deleted by MindSpore, together with its kernel.
class AotKernelData {
 public:
  virtual ~AotKernelData() = default;
};

class AotExtra {
 public:
  virtual ~AotExtra() = default;
  virtual bool HasAttr(std::string name) = 0;

  void set_kernel_data(AotKernelData* kernel_data) { kernel_data_ = kernel_data; }
  const AotKernelData* kernel_data() const { return kernel_data_; }
  // Memory that a call gets behind its outputs, each of so many bytes.
  void set_workspace(const std::vector<size_t>& bytes) { workspace_ = bytes; }
  const std::vector<size_t>& workspace() const { return workspace_; }

  bool get(const char* name, bool otherwise) { return HasAttr(name) ? GetBool(name) : otherwise; }
  float get(const char* name, float otherwise) {
    return HasAttr(name) ? GetFloat(name) : otherwise;
  }
  int64_t get(const char* name, int64_t otherwise) {
    return HasAttr(name) ? GetInt(name) : otherwise;
  }
  std::string get(const char* name) { return HasAttr(name) ? GetString(name) : std::string(); }

 private:  // in the virtual table's order
  virtual bool GetBool(std::string name) = 0;
  virtual int64_t GetInt(std::string name) = 0;
  virtual float GetFloat(std::string name) = 0;
  virtual std::string GetString(std::string name) = 0;
  virtual std::vector<int64_t> GetInts(std::string name) = 0;
  virtual std::vector<float> GetFloats(std::string name) = 0;
  virtual std::vector<std::vector<int64_t>> GetInts2D(std::string name) = 0;
  virtual std::vector<std::vector<float>> GetFloats2D(std::string name) = 0;

  std::vector<size_t> workspace_;
  AotKernelData* kernel_data_ = nullptr;
};

}  // namespace codellama_rt
