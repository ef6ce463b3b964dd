// Chat with the fused graph in Kotlin, on Android or any JVM: ORT GenAI brings tokenizer and sampling.

import ai.onnxruntime.genai.Adapters
import ai.onnxruntime.genai.Generator
import ai.onnxruntime.genai.GeneratorParams
import ai.onnxruntime.genai.Model
import ai.onnxruntime.genai.Tokenizer
import java.io.File

/**
 * Answers a question; blocks until the end, so call it off the main thread.
 *
 * @param folder the folder that `dash-fuse` wrote, as files: not inside the app's assets
 * @param messages the conversation in the format of OpenAI's API, as JSON
 * @param preset "quality", "balanced" or "fast"; null is the default budget of `dash-fuse`
 */
fun answer(folder: String, messages: String, preset: String?, onText: (String) -> Unit) {
    val template = File(folder, "chat_template.jinja").readText() // null would crash GenAI 0.18
    Model(folder).use { model ->
        Tokenizer(model).use { tokenizer ->
            val prompt = tokenizer.applyChatTemplate(template, messages, null, true)
            tokenizer.encode(prompt).use { tokens ->
                GeneratorParams(model).use { options ->
                    val context = options.getSearchNumber("max_length")
                    val length = tokens.getSequence(0).size + 256.0 // with the answer
                    options.setSearchOption("max_length", minOf(length, context))
                    Generator(model, options).use { generator ->
                        Adapters(model).use { budgets ->
                            if (preset != null) {
                                budgets.loadAdapter("$folder/$preset.onnx_adapter", preset)
                                generator.setActiveAdapter(budgets, preset)
                            }
                            generator.appendTokenSequences(tokens)
                            tokenizer.createStream().use { text ->
                                while (!generator.isDone) {
                                    val before = generator.tokenCount()
                                    generator.generateNextToken()
                                    if (generator.tokenCount() > before) { // an end token is not kept
                                        onText(text.decode(generator.getLastTokenInSequence(0)))
                                    }
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}

fun main(args: Array<String>) {
    val signs = Regex("[\\x00-\\x1f\"\\\\]") // which JSON writes as \u and a number
    val question = args[1].replace(signs) { "\\u%04x".format(it.value.codePointAt(0)) }
    answer(args[0], """[{"role": "user", "content": "$question"}]""", args.getOrNull(2)) {
        print(it)
        System.out.flush()
    }
    println()
}
