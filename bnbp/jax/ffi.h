/// \file
/// \brief XLA's stable C interface for foreign functions, as far as it is used here. Not an interface of ours.
///
/// These structures are those of xla/ffi/api/c_api.h, which jaxlib brings along and XLA promises not to change within a
/// major version: new fields come at a structure's end, and each structure says its size. They are declared once more,
/// so that jaxlib is not needed to compile this and one build serves every jaxlib from 0.7 on.
#ifndef BNBP_JAX_FFI_H
#define BNBP_JAX_FFI_H

#include <cstddef>
#include <cstdint>

namespace bnbp {
namespace xla {

/// The major version that this was written for.
constexpr int MAJOR_VERSION = 0;

/// What a structure may be followed by, a linked list.
struct Extension {
    std::size_t struct_size;
    int type;
    Extension* next;
};
enum { METADATA_EXTENSION = 1 };

struct Version {
    std::size_t struct_size;
    Extension* extensions;
    int major_version;
    int minor_version;
};

/// What XLA wants to know of a handler. Newer versions of this have more at the end, which nobody need fill in.
struct Metadata {
    std::size_t struct_size;
    Version api_version;
    std::uint32_t traits;
};
struct MetadataExtension {
    Extension base;
    Metadata* metadata;
};

/// What a handler that fails returns, and XLA destroys.
struct Error;
struct ErrorCreateArgs {
    std::size_t struct_size;
    Extension* extensions;
    const char* message;
    int code;
};
enum ErrorCode { INVALID_ARGUMENT = 3, RESOURCE_EXHAUSTED = 8, INTERNAL = 13 };

/// XLA's functions. The one that is called is the first.
struct Api {
    std::size_t struct_size;
    Extension* extensions;
    Version api_version;
    const void* internal_api;
    Error* (*error_create)(ErrorCreateArgs*);
};

/// The element types that have a meaning here, of all that XLA has.
enum DataType { U32 = 8, F16 = 10, F32 = 11, F64 = 12, BF16 = 16, S64 = 5 };

/// A dense tensor in C order.
struct Buffer {
    std::size_t struct_size;
    Extension* extensions;
    int type;
    void* data;
    std::int64_t rank;
    const std::int64_t* shape;
};

/// The operands, or the results.
struct Buffers {
    std::size_t struct_size;
    Extension* extensions;
    std::int64_t size;
    const int* kinds; // 1: a buffer
    Buffer* const* buffers;
};
enum { BUFFER = 1 };

struct Text {
    const char* data;
    std::size_t size;
};
struct Scalar {
    int type;
    const void* value;
};
struct Attributes {
    std::size_t struct_size;
    Extension* extensions;
    std::int64_t size;
    const int* kinds; // 3: a scalar
    const Text* const* names;
    const void* const* values;
};
enum { SCALAR = 3 };

/// A call.
struct CallFrame {
    std::size_t struct_size;
    Extension* extensions;
    const Api* api;
    void* context;
    int stage;
    Buffers operands;
    Buffers results;
    Attributes attributes;
};
enum { EXECUTE = 3 };

using Handler = Error* (*)(CallFrame*);

} // namespace xla
} // namespace bnbp

#endif // BNBP_JAX_FFI_H
