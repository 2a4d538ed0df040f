// What ECMAScript itself says. Reads one JSON array from standard input, writes one to standard output.
//
//   bodies    [[source, body], …]      the indices of the pairs in which the body is no fixed point, or its data is
//                                      not what the source says
//   numbers   ["3ff0000000000000", …]  String(x) of each double, given as the 16 hex digits of its bits
import { readFileSync } from "node:fs";

const again = (text) => JSON.stringify(JSON.parse(text));

const questions = {
  bodies: (pairs) =>
    pairs.flatMap(([source, body], index) =>
      again(body) === body && JSON.stringify(JSON.parse(body).data) === again(source) ? [] : [index],
    ),
  numbers: (bits) => bits.map((hex) => String(Buffer.from(hex, "hex").readDoubleBE(0))),
};

const input = JSON.parse(readFileSync(0, "utf8"));
process.stdout.write(JSON.stringify(questions[process.argv[2]](input)));
