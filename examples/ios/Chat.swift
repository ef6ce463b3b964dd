// Chat with the fused graph in Swift, through ORT GenAI's Objective-C API: it has no chat template
// and no adapters, so the prompt comes as text, and the budget as an input of the graph.

import onnxruntime_genai_objc

/// Answers a prompt; blocks until the end, so call it off the main thread.
///
/// - Parameters:
///   - folder: what `dash-fuse` wrote, in the app's bundle.
///   - prompt: in the model's chat format, as `chat_template.jinja` of the folder renders it.
///   - budget: fraction of the reference's time per token; `dash_fused.json` has the presets. nil
///     is the default of `dash-fuse`, and needed if the graph has one path and takes no budget.
func answer(folder: String, prompt: String, budget: Float?, onText: (String) -> Void) throws {
    let model = try OGAModel(path: folder)
    let tokenizer = try OGATokenizer(model: model)
    let options = try OGAGeneratorParams(model: model)
    let tokens = try tokenizer.encode(prompt)
    let length = Double(tokens.sequenceCount(at: 0, error: nil) + 256)  // with the answer
    let context = options.getSearchNumber("max_length", error: nil)
    try options.setSearchOption("max_length", doubleValue: min(length, context))

    var value = budget ?? 0  // float32 [1]; not copied, so the generator lives inside the closure
    try withUnsafeMutableBytes(of: &value) { bytes in
        let generator = try OGAGenerator(model: model, params: options)
        if budget != nil {
            let tensor = try OGATensor(dataPointer: bytes.baseAddress!, shape: [1], type: .float32)
            try generator.setModelInput("dash_budget", tensor: tensor)
        }
        try generator.appendTokenSequences(tokens)
        let text = try OGATokenizerStream(tokenizer: tokenizer)
        while try !generator.isDone() {
            let before = generator.sequenceCount(at: 0, error: nil)
            try generator.generateNextToken()
            let count = generator.sequenceCount(at: 0, error: nil)
            if count > before {  // an end token is not kept
                onText(try text.decode(generator.sequenceData(at: 0)[count - 1]))
            }
        }
    }
}
