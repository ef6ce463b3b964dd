// Chat with the fused graph in C++: ORT GenAI brings tokenizer, chat template, sampling and stop.
//
// README.md in this folder says how to build it.
//
//   export LD_LIBRARY_PATH=.    # where GenAI looks for ONNX Runtime first
//   ./chat out/fused "What is the capital of France?"
//   ./chat out/fused "What is the capital of France?" fast     # a preset's adapter
//   ./chat out/fused "Count to ten." "" five                   # ends before "five"

#if __has_include(<ort_genai_c.h>)  // of GenAI's releases for C; the wheel has none
#include <ort_genai_c.h>
#else
#include <cstddef>
#include <cstdint>
extern "C" {
struct OgaResult;
struct OgaModel;
struct OgaTokenizer;
struct OgaTokenizerStream;
struct OgaSequences;
struct OgaGeneratorParams;
struct OgaGenerator;
struct OgaAdapters;
const char* OgaResultGetError(const OgaResult*);
void OgaDestroyString(const char*);
void OgaDestroyModel(OgaModel*);
void OgaDestroyTokenizer(OgaTokenizer*);
void OgaDestroyTokenizerStream(OgaTokenizerStream*);
void OgaDestroySequences(OgaSequences*);
void OgaDestroyGeneratorParams(OgaGeneratorParams*);
void OgaDestroyGenerator(OgaGenerator*);
void OgaDestroyAdapters(OgaAdapters*);
void OgaShutdown();
OgaResult* OgaCreateModel(const char*, OgaModel**);
OgaResult* OgaCreateTokenizer(const OgaModel*, OgaTokenizer**);
OgaResult* OgaTokenizerApplyChatTemplate(const OgaTokenizer*, const char* chat_template,
                                         const char* messages, const char* tools,
                                         bool add_generation_prompt, const char** out);
OgaResult* OgaCreateSequences(OgaSequences**);
OgaResult* OgaTokenizerEncode(const OgaTokenizer*, const char*, OgaSequences*);
size_t OgaSequencesGetSequenceCount(const OgaSequences*, size_t);
OgaResult* OgaCreateTokenizerStream(const OgaTokenizer*, OgaTokenizerStream**);
OgaResult* OgaTokenizerStreamDecode(OgaTokenizerStream*, int32_t token, const char** out);
OgaResult* OgaCreateGeneratorParams(const OgaModel*, OgaGeneratorParams**);
OgaResult* OgaGeneratorParamsGetSearchNumber(const OgaGeneratorParams*, const char* name, double*);
OgaResult* OgaGeneratorParamsSetSearchNumber(OgaGeneratorParams*, const char* name, double);
OgaResult* OgaCreateGenerator(const OgaModel*, const OgaGeneratorParams*, OgaGenerator**);
OgaResult* OgaCreateAdapters(const OgaModel*, OgaAdapters**);
OgaResult* OgaLoadAdapter(OgaAdapters*, const char* path, const char* name);
OgaResult* OgaSetActiveAdapter(OgaGenerator*, OgaAdapters*, const char* name);
OgaResult* OgaGenerator_AppendTokenSequences(OgaGenerator*, const OgaSequences*);
OgaResult* OgaGenerator_GenerateNextToken(OgaGenerator*);
bool OgaGenerator_IsDone(OgaGenerator*);
size_t OgaGenerator_GetSequenceCount(const OgaGenerator*, size_t);
const int32_t* OgaGenerator_GetSequenceData(const OgaGenerator*, size_t);
}
#endif

#include <algorithm>
#include <cstdio>
#include <iostream>
#include <memory>
#include <stdexcept>
#include <string>

constexpr double kNewTokens = 256;  // beyond the prompt, as far as the context reaches

void check(OgaResult* result) {
  if (result != nullptr) throw std::runtime_error(OgaResultGetError(result));
}

// What a function of GenAI makes, with what destroys it.
template <typename T, typename Make, typename... Given>
std::unique_ptr<T, void (*)(T*)> made(void (*destroy)(T*), Make make, Given... given) {
  T* found = nullptr;
  check(make(given..., &found));
  return {found, destroy};
}

std::string quoted(const std::string& text) {  // as JSON
  std::string out = "\"";
  for (const unsigned char c : text) {
    char escaped[7];
    if (c == '"' || c == '\\') {
      out += {'\\', static_cast<char>(c)};
    } else if (c < 0x20) {
      std::snprintf(escaped, sizeof escaped, "\\u%04x", c);
      out += escaped;
    } else {
      out += static_cast<char>(c);
    }
  }
  return out + '"';
}

// How much of the end of a text could be the beginning of the stop string.
size_t held_back(const std::string& text, const std::string& stop) {
  for (size_t size = std::min(text.size(), stop.size()); size > 0; --size)
    if (text.compare(text.size() - size, size, stop, 0, size) == 0) return size;
  return 0;
}

void chat(const std::string& folder, const std::string& question, const std::string& preset,
          const std::string& stop) {
  auto model = made(OgaDestroyModel, OgaCreateModel, folder.c_str());
  auto tokenizer = made(OgaDestroyTokenizer, OgaCreateTokenizer, model.get());
  auto sequences = made(OgaDestroySequences, OgaCreateSequences);
  const std::string messages = R"([{"role": "user", "content": )" + quoted(question) + "}]";
  const char* prompt = nullptr;
  check(OgaTokenizerApplyChatTemplate(tokenizer.get(), nullptr, messages.c_str(), nullptr, true,
                                      &prompt));
  check(OgaTokenizerEncode(tokenizer.get(), prompt, sequences.get()));
  OgaDestroyString(prompt);

  auto params = made(OgaDestroyGeneratorParams, OgaCreateGeneratorParams, model.get());
  double context = 0;
  check(OgaGeneratorParamsGetSearchNumber(params.get(), "max_length", &context));
  const double length = OgaSequencesGetSequenceCount(sequences.get(), 0) + kNewTokens;
  check(OgaGeneratorParamsSetSearchNumber(params.get(), "max_length", std::min(length, context)));
  auto adapters = made(OgaDestroyAdapters, OgaCreateAdapters, model.get());
  auto generator = made(OgaDestroyGenerator, OgaCreateGenerator, model.get(), params.get());
  if (!preset.empty()) {  // instead of the budget that the graph has
    const std::string path = folder + "/" + preset + ".onnx_adapter";
    check(OgaLoadAdapter(adapters.get(), path.c_str(), preset.c_str()));
    check(OgaSetActiveAdapter(generator.get(), adapters.get(), preset.c_str()));
  }
  check(OgaGenerator_AppendTokenSequences(generator.get(), sequences.get()));

  auto stream = made(OgaDestroyTokenizerStream, OgaCreateTokenizerStream, tokenizer.get());
  std::string held;
  size_t told = OgaGenerator_GetSequenceCount(generator.get(), 0), at = std::string::npos;
  while (at == std::string::npos && !OgaGenerator_IsDone(generator.get())) {
    check(OgaGenerator_GenerateNextToken(generator.get()));
    const size_t count = OgaGenerator_GetSequenceCount(generator.get(), 0);
    for (; told < count; ++told) {  // none for the end of the answer
      const char* piece = nullptr;
      const int32_t token = OgaGenerator_GetSequenceData(generator.get(), 0)[told];
      check(OgaTokenizerStreamDecode(stream.get(), token, &piece));
      held += piece;
    }
    if (!stop.empty()) at = held.find(stop);
    const size_t safe = std::min(at, held.size() - held_back(held, stop));
    std::cout << held.substr(0, safe) << std::flush;
    held.erase(0, safe);
  }
  if (at != std::string::npos) held.clear();
  std::cout << held << std::endl;
}

int main(int argc, char** argv) {
  if (argc < 3) {
    std::cerr << "usage: chat FOLDER QUESTION [PRESET] [STOP]\n";
    return 2;
  }
  int code = 0;
  try {
    chat(argv[1], argv[2], argc > 3 ? argv[3] : "", argc > 4 ? argv[4] : "");
  } catch (const std::exception& error) {
    std::cerr << "chat: " << error.what() << '\n';
    code = 1;
  }
  OgaShutdown();
  return code;
}
