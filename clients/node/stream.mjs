// Streams an answer from a kvfold server and prints what was done with its KV cache.
//
//   node stream.mjs [--server HOST:PORT] [--shared-layers N] [--max-tokens N] PROMPT

import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";

import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";

const DEADLINE_SECONDS = 120;

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    server: { type: "string", default: process.env.KVFOLD_SERVER ?? "localhost:50051" },
    "shared-layers": { type: "string", default: "0" },
    "max-tokens": { type: "string", default: "64" },
  },
});
if (positionals.length !== 1) {
  console.error("stream.mjs: give one prompt, in quotes");
  process.exit(2);
}

const definition = protoLoader.loadSync("kvfold/v1/generation.proto", {
  includeDirs: [process.env.KVFOLD_PROTO ?? fileURLToPath(new URL("../../proto", import.meta.url))],
  keepCase: true,
  longs: Number,
  enums: String,
  defaults: true,
  oneofs: true,
});
const { GenerationService } = grpc.loadPackageDefinition(definition).kvfold.v1;
const client = new GenerationService(values.server, grpc.credentials.createInsecure());

const request = {
  chat: { messages: [{ role: "ROLE_USER", content: positionals[0] }] },
  sampling: { temperature: 0 },
  stopping: { max_tokens: Number(values["max-tokens"]) },
  quality: { shared_layers: Number(values["shared-layers"]) },
};
const stream = client.generateStream(request, { deadline: Date.now() + DEADLINE_SECONDS * 1000 });

try {
  for await (const message of stream) {
    process.stdout.write(message.text);
    if (message.finish) {
      const { usage, memory } = message.finish;
      process.stdout.write("\n");
      console.log(
        `${usage.completion_tokens} tokens, ${memory.shared_layers} shared layers, ` +
          `${memory.kv_bytes_held} KV bytes held, ${memory.kv_bytes_saved} saved`,
      );
    }
  }
} catch (error) {
  console.error(`stream.mjs: ${grpc.status[error.code] ?? "error"}: ${error.details ?? error.message}`);
  process.exitCode = 1;
} finally {
  client.close();
}
