// The C declarations that CANN's op build would generate from op_host, one an op: for MindSpore's
// `ops.Custom`, which reads an installed package's headers.
#include <cctype>

#include "register/op_def_registry.h"

#define CLRT_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

// "key_cache" -> "keyCache"
std::string camel(const std::string& snake) {
  std::string out;
  for (size_t i = 0; i < snake.size(); ++i) {
    out += snake[i] == '_' ? char(std::toupper(snake[++i])) : snake[i];
  }
  return out;
}

bool named(const std::vector<ops::OpParamDef>& tensors, const std::string& name) {
  for (const ops::OpParamDef& t : tensors) {
    if (t.name == name) return true;
  }
  return false;
}

// Inputs, attributes, outputs; what is both input and output stands among the inputs, as a Ref.
std::string parameters(const ops::OpDef& op) {
  std::string out;
  for (const ops::OpParamDef& t : op.inputs) {
    if (t.value_depend) {
      out += "const aclIntArray *" + camel(t.name) + ", ";
    } else if (named(op.outputs, t.name)) {
      out += "aclTensor *" + camel(t.name) + "Ref, ";
    } else {
      out += "const aclTensor *" + camel(t.name) + ", ";
    }
  }
  for (const std::string& attribute : op.attributes) out += "double " + camel(attribute) + ", ";
  for (const ops::OpParamDef& t : op.outputs) {
    if (!named(op.inputs, t.name)) out += "const aclTensor *" + camel(t.name) + ", ";
  }
  return out;
}

}  // namespace

// `type` is the op's in op_host, such as "ClrtRmsNorm".
CLRT_EXPORT const char* clrt_emu_header(const char* type) {
  static std::string text;
  const std::string name = std::string("aclnn") + type;
  text =
      "aclnnStatus " + name + "GetWorkspaceSize(" + parameters(ops::registry().at(type)) +
      "uint64_t *workspaceSize, aclOpExecutor **executor);\n\naclnnStatus " + name +
      "(void *workspace, uint64_t workspaceSize, aclOpExecutor *executor, aclrtStream stream);\n";
  return text.c_str();
}
