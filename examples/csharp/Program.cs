// Chat with the fused graph in C#: ORT GenAI brings tokenizer, chat template and sampling.
//
//   dash-fuse out/
//   dotnet run --project examples/csharp -- out/fused "Why is the sky blue?" fast

using System.Text.Json;
using Microsoft.ML.OnnxRuntimeGenAI;

if (args.Length < 2)
{
    Console.Error.WriteLine("usage: chat FOLDER QUESTION [PRESET]");
    return 2;
}
using var model = new Model(args[0]);
using var tokenizer = new Tokenizer(model);
using var options = new GeneratorParams(model);
var messages = JsonSerializer.Serialize(new[] { new { role = "user", content = args[1] } });
using var prompt = tokenizer.Encode(tokenizer.ApplyChatTemplate(null, messages, null, true));
var context = options.GetSearchNumber("max_length");
options.SetSearchOption("max_length", Math.Min(prompt[0].Length + 256, context)); // with the answer
using var generator = new Generator(model, options);

using var budgets = new Adapters(model); // without an adapter, the default budget of dash-fuse
if (args.Length > 2)
{
    budgets.LoadAdapter(Path.Combine(args[0], args[2] + ".onnx_adapter"), args[2]);
    generator.SetActiveAdapter(budgets, args[2]);
}

generator.AppendTokenSequences(prompt);
using var text = tokenizer.CreateStream();
while (!generator.IsDone())
{
    generator.GenerateNextToken();
    Console.Write(text.Decode(generator.GetNextTokens()[0]));
}
Console.WriteLine();
return 0;
