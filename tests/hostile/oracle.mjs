// Another opinion, one line at a time: a JSON array in, what ECMAScript makes of it out.
//
//   ["render", text]   JSON.stringify(JSON.parse(text)), or null where the text is not JSON
//   ["url", text]      [host name, port] by the WHATWG URL standard, or null where it is no URL
import { createInterface } from "node:readline";

const questions = {
  render: (text) => JSON.stringify(JSON.parse(text)),
  url: (text) => {
    const url = new URL(text);
    return [url.hostname, url.port];
  },
};

for await (const line of createInterface({ input: process.stdin })) {
  const [question, text] = JSON.parse(line);
  let answer = null;
  try {
    answer = questions[question](text);
  } catch {
    // no answer is an answer
  }
  process.stdout.write(JSON.stringify(answer) + "\n");
}
