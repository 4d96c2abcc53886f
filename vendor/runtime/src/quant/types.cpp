// Tables of tensor element types.
#include "quant/types.h"

#include <algorithm>

namespace qi {

namespace {

constexpr TypeTraits type_table[] = {
    {Type::f32, "F32", 1, 4},       {Type::f16, "F16", 1, 2},       {Type::q4_0, "Q4_0", 32, 18},
    {Type::q4_1, "Q4_1", 32, 20},   {Type::q5_0, "Q5_0", 32, 22},   {Type::q5_1, "Q5_1", 32, 24},
    {Type::q8_0, "Q8_0", 32, 34},   {Type::q2_k, "Q2_K", 256, 84},  {Type::q3_k, "Q3_K", 256, 110},
    {Type::q4_k, "Q4_K", 256, 144}, {Type::q5_k, "Q5_K", 256, 176}, {Type::q6_k, "Q6_K", 256, 210},
    {Type::bf16, "BF16", 1, 2},
};

constexpr TypeLayout layout_table[] = {
    {0, "F32", 1, 4},         {1, "F16", 1, 2},         {2, "Q4_0", 32, 18},
    {3, "Q4_1", 32, 20},      {6, "Q5_0", 32, 22},      {7, "Q5_1", 32, 24},
    {8, "Q8_0", 32, 34},      {9, "Q8_1", 32, 40},      {10, "Q2_K", 256, 84},
    {11, "Q3_K", 256, 110},   {12, "Q4_K", 256, 144},   {13, "Q5_K", 256, 176},
    {14, "Q6_K", 256, 210},   {15, "Q8_K", 256, 292},   {16, "IQ2_XXS", 256, 66},
    {17, "IQ2_XS", 256, 74},  {18, "IQ3_XXS", 256, 98}, {19, "IQ1_S", 256, 50},
    {20, "IQ4_NL", 32, 18},   {21, "IQ3_S", 256, 110},  {22, "IQ2_S", 256, 82},
    {23, "IQ4_XS", 256, 136}, {24, "I8", 1, 1},         {25, "I16", 1, 2},
    {26, "I32", 1, 4},        {27, "I64", 1, 8},        {28, "F64", 1, 8},
    {29, "IQ1_M", 256, 56},   {30, "BF16", 1, 2},       {34, "TQ1_0", 256, 54},
    {35, "TQ2_0", 256, 66},   {39, "MXFP4", 32, 17},    {40, "NVFP4", 64, 36},
    {41, "Q1_0", 128, 18},
};

}  // namespace

std::span<const TypeTraits> all_types() {
    return type_table;
}

const TypeTraits* find_type(int32_t gguf_number) {
    const auto* found = std::ranges::find(type_table, Type(gguf_number), &TypeTraits::type);
    return found == std::end(type_table) ? nullptr : found;
}

const TypeTraits& traits(Type type) {
    return *find_type(int32_t(type));
}

std::span<const TypeLayout> all_layouts() {
    return layout_table;
}

const TypeLayout* find_layout(int32_t gguf_number) {
    const auto* found =
        std::ranges::lower_bound(layout_table, gguf_number, {}, &TypeLayout::number);
    return found == std::end(layout_table) || found->number != gguf_number ? nullptr : found;
}

const char* gguf_type_name(int32_t gguf_number) {
    const TypeLayout* layout = find_layout(gguf_number);
    return layout ? layout->name : "unknown";
}

}  // namespace qi
