// What payload.py packed: the index at once, a block of rollouts when one of them is looked at.

const KEPT_BLOCKS = 12;
const NO_ENTROPY = 65535;

async function inflate(element) {
  const bytes = Uint8Array.from(atob(element.textContent), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

async function readIndex() {
  const data = await inflate(document.querySelector(".rollout-index"));
  return JSON.parse(new TextDecoder().decode(data));
}

// All blocks come after the scripts: a page that is still being read may not have the one that is asked for.
const whole = new Promise((resolve) => {
  if (document.readyState !== "loading") resolve();
  else document.addEventListener("DOMContentLoaded", resolve);
});

class Rollouts {
  constructor(index) {
    this.index = index;
    this.cache = new Map(); // the oldest first
  }

  // Texts, entropies and figures of rollout i; null where the page does not hold them.
  async read(i) {
    const number = this.index.blocks.findLastIndex((first) => first <= i);
    if (number < 0 || number === this.index.blocks.length - 1) return null;
    const block = await this.block(number);
    const found = block.rollout(i - this.index.blocks[number]);
    if (found.shared) {
      const parent = await this.read(this.index.rollouts.parent[i]);
      found.pieces = [...parent.pieces.slice(0, found.shared), ...found.pieces];
    }
    return found;
  }

  async block(number) {
    if (!this.cache.has(number)) {
      await whole;
      this.cache.set(number, inflate(document.querySelectorAll(".rollout-block")[number]));
      if (this.cache.size > KEPT_BLOCKS) this.cache.delete(this.cache.keys().next().value);
    }
    return new Block(await this.cache.get(number), this.index.quantum);
  }
}

class Block {
  constructor(bytes, quantum) {
    const length = new DataView(bytes.buffer, bytes.byteOffset, 4).getUint32(0, true);
    this.head = JSON.parse(new TextDecoder().decode(bytes.subarray(4, 4 + length)));
    this.quantum = quantum;
    const count = (bytes.length - 4 - length) / 4;
    const plane = (k) => bytes.subarray(4 + length + k * count, 4 + length + (k + 1) * count);
    this.entropy = [plane(0), plane(1)];
    this.length = [plane(2), plane(3)];
  }

  rollout(k) {
    const head = this.head;
    const letters = Array.from(head.text[k]); // code points, as they were counted
    const pieces = [];
    let at = 0;
    let begin = 0;
    for (let i = 0; i < k; i++) begin += head.pieces[i];
    for (let i = begin; i < begin + head.pieces[k]; i++) {
      const length = this.length[0][i] + 256 * this.length[1][i];
      const code = this.entropy[0][i] + 256 * this.entropy[1][i];
      pieces.push({
        text: letters.slice(at, at + length).join(""),
        entropy: code === NO_ENTROPY ? null : code * this.quantum,
        end: false,
      });
      at += length;
    }
    if (pieces.length && head.ended[k]) pieces[pieces.length - 1].end = true;
    return {
      pieces,
      shared: head.shared[k],
      kept: head.kept[k],
      keptTokens: head.kept_tokens[k],
      shaded: Boolean(head.shaded[k]),
      starts: head.starts[k],
      end: head.end[k],
      h: head.h[k],
      ppl: head.ppl[k].map(number),
      expected: head.expected[k].map(number),
      answer: head.answer[k] && head.answer[k].map(number),
      hint: head.hints[head.hint[k]],
      finish: head.finish[k],
    };
  }
}

// A figure as it was packed: infinity is a word.
function number(value) {
  return value === null ? null : Number(value);
}
