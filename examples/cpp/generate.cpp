// The fused graph in C++: token ids in, greedy token ids out, K/V that grow by concatenation.
//
// README.md in this folder says how to build it.
//
//   ./generate out/fused/model.onnx 32 1 9690 198 2683
//
// A folder of `dash-fuse BUNDLE` will do: its budget has a default, which a host may feed all the same.
// Layers that keep states instead of K and V (LFM 2, Qwen 3.5) are left to chat.cpp.

#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <iostream>
#include <stdexcept>
#include <string>
#include <vector>

void generate(const char* model, int count, std::vector<int64_t> ids) {
  Ort::Env env(ORT_LOGGING_LEVEL_ERROR, "dash");
  Ort::Session session(env, model, Ort::SessionOptions{});
  auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  Ort::AllocatorWithDefaultOptions allocator;

  std::vector<std::string> inputs, outputs;
  for (size_t i = 0; i < session.GetInputCount(); ++i)
    inputs.emplace_back(session.GetInputNameAllocated(i, allocator).get());
  for (size_t i = 0; i < session.GetOutputCount(); ++i)
    outputs.emplace_back(session.GetOutputNameAllocated(i, allocator).get());
  size_t layers = 0;  // the inputs are ids, mask, then K and V of each layer; outputs likewise
  while (std::count(outputs.begin(), outputs.end(), "present." + std::to_string(layers) + ".key"))
    ++layers;
  const size_t pasts = 2 * layers;
  for (const auto& name : inputs)
    if (name.rfind("past.", 0) == 0)
      throw std::runtime_error("this graph has layers that keep states: run it with chat");
  inputs.resize(2 + pasts);
  outputs.resize(1 + pasts);  // without `dash_path`

  float budget = 0;
  if (const char* given = std::getenv("DASH_BUDGET")) {
    budget = std::strtof(given, nullptr);
    inputs.push_back("dash_budget");
  }
  std::vector<const char*> input_names, output_names;
  for (const auto& name : inputs) input_names.push_back(name.c_str());
  for (const auto& name : outputs) output_names.push_back(name.c_str());

  std::vector<Ort::Value> past;
  auto shape = session.GetInputTypeInfo(2).GetTensorTypeAndShapeInfo().GetShape();
  shape[2] = 0;  // [1, heads, tokens, size]
  for (size_t i = 0; i < pasts; ++i)
    past.push_back(Ort::Value::CreateTensor<float>(allocator, shape.data(), shape.size()));

  int64_t total = 0;
  for (; count > 0; --count) {
    total += static_cast<int64_t>(ids.size());
    std::vector<int64_t> mask(total, 1);
    const int64_t ids_shape[] = {1, static_cast<int64_t>(ids.size())};
    const int64_t mask_shape[] = {1, total}, one[] = {1};
    std::vector<Ort::Value> feeds;
    feeds.push_back(Ort::Value::CreateTensor(memory, ids.data(), ids.size(), ids_shape, 2));
    feeds.push_back(Ort::Value::CreateTensor(memory, mask.data(), mask.size(), mask_shape, 2));
    for (auto& value : past) feeds.push_back(std::move(value));
    if (budget > 0) feeds.push_back(Ort::Value::CreateTensor(memory, &budget, 1, one, 1));
    auto found = session.Run({}, input_names.data(), feeds.data(), feeds.size(),
                             output_names.data(), output_names.size());
    const auto dims = found[0].GetTensorTypeAndShapeInfo().GetShape();
    const float* row = found[0].GetTensorData<float>() + (dims[1] - 1) * dims[2];
    const int64_t next = std::max_element(row, row + dims[2]) - row;
    std::cout << next << (count > 1 ? " " : "\n") << std::flush;
    past.assign(std::make_move_iterator(found.begin() + 1), std::make_move_iterator(found.end()));
    ids = {next};
  }
}

int main(int argc, char** argv) {
  if (argc < 4) {
    std::cerr << "usage: generate MODEL COUNT ID... (DASH_BUDGET in the environment)\n";
    return 2;
  }
  std::vector<int64_t> ids;
  for (int i = 3; i < argc; ++i) ids.push_back(std::atoll(argv[i]));
  try {
    generate(argv[1], std::atoi(argv[2]), ids);
  } catch (const std::exception& error) {
    std::cerr << "generate: " << error.what() << '\n';
    return 1;
  }
}
