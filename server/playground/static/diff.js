// Words that differ between two texts, by a longest common subsequence of words.

const MOST = 3000; // words of each text that are compared: the table has their product of places

export function wordsOf(text) {
  return [...text.matchAll(/\S+/g)].map((found) => ({ word: found[0], start: found.index, end: found.index + found[0].length }));
}

// The words of `text` that are not in the longest common subsequence with `other`.
export function differing(text, other) {
  const own = wordsOf(text).slice(0, MOST), theirs = wordsOf(other).slice(0, MOST);
  const width = theirs.length + 1;
  const best = new Uint16Array((own.length + 1) * width);
  for (let i = own.length - 1; i >= 0; i -= 1) {
    for (let j = theirs.length - 1; j >= 0; j -= 1) {
      const same = own[i].word === theirs[j].word;
      best[i * width + j] = same ? best[(i + 1) * width + j + 1] + 1 : Math.max(best[(i + 1) * width + j], best[i * width + j + 1]);
    }
  }
  const found = [];
  let i = 0, j = 0;
  while (i < own.length) {
    if (j < theirs.length && own[i].word === theirs[j].word) [i, j] = [i + 1, j + 1];
    else if (j < theirs.length && best[i * width + j + 1] >= best[(i + 1) * width + j]) j += 1;
    else found.push(own[i++]);
  }
  return found;
}

// The indices of the records that hold a part of one of the words.
export function touched(records, words) {
  const found = new Set();
  let at = 0, next = 0;
  records.forEach((record, index) => {
    if (record.control) return;
    const end = at + record.text.length;
    while (next < words.length && words[next].end <= at) next += 1;
    for (let k = next; k < words.length && words[k].start < end; k += 1) if (words[k].end > at) found.add(index);
    at = end;
  });
  return found;
}
