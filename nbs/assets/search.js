// The site's search. The renderer's script calls `new Fuse(entries).search(query, {limit})`; this class stands in for
// the library of that name. A result is ranked by: words of the query that it has; exact words before synonyms before
// beginnings of words; a title that is the query; the part of the book (story, guides, reference, appendix, workshop),
// where words in a title lift a page by two parts; how often.
const SYNONYMS = window.searchSynonyms || [];
const STOP = new Set("a an and do does how i in is it my of on the to what".split(" "));
const PER_PAGE = 3; // entries of one page among the results

const words = (text) => " " + ((text || "").toLowerCase().match(/[\p{L}\p{N}_]+/gu) || []).join(" ") + " ";
const count = (text, phrase) => text.split(" " + phrase + " ").length - 1;

// the query's units: a phrase that has synonyms, or a word; each is the ways to write it, the one that was typed first
function units(query) {
  let left = words(query);
  const found = [];
  for (const group of SYNONYMS) {
    const forms = group.map((form) => words(form).trim());
    const typed = forms.filter((form) => left.includes(" " + form + " ")).sort((a, b) => b.length - a.length)[0];
    if (!typed) continue;
    found.push([typed, ...forms.filter((form) => form !== typed)]);
    left = left.replace(" " + typed + " ", " ");
  }
  const rest = left.trim().split(" ").filter(Boolean);
  const said = rest.filter((word) => !STOP.has(word));
  return [...found, ...(found.length || said.length ? said : rest).map((word) => [word])];
}

// 0: the unit as typed, 1: a synonym, 2: a word that begins so, 3: not there
function distance(unit, text) {
  if (text.includes(" " + unit[0] + " ")) return 0;
  if (unit.slice(1).some((form) => text.includes(" " + form + " "))) return 1;
  return unit[0].length > 1 && text.includes(" " + unit[0]) ? 2 : 3;
}

class Fuse {
  constructor(entries) { this.entries = []; (entries || []).forEach((entry) => this.add(entry)); }
  add(entry) {
    const head = words(entry.title) + words(entry.section);
    this.entries.push({ item: entry, head, all: head + words(entry.text), place: this.entries.length });
  }
  search(query, options) {
    const asked = units(query), whole = words(query);
    const ranked = [];
    for (const e of this.entries) {
      const far = asked.map((unit) => distance(unit, e.all));
      const missing = far.filter((d) => d === 3).length;
      if (missing === asked.length) continue;
      const there = far.filter((d) => d < 3);
      const title = [words(e.item.section), words(e.item.title)].some((text) => text === whole) ? 0 : 1;
      const head = asked.every((unit) => distance(unit, e.head) < 3) ? 0 : 2;
      const often = asked.reduce((sum, unit) => sum + count(e.all, unit[0]), 0);
      ranked.push({ e, key: [missing, Math.max(...there), title, (e.item.part ?? 9) + head, head, -often, e.place] });
    }
    ranked.sort((a, b) => { const i = a.key.findIndex((x, k) => x !== b.key[k]); return i < 0 ? 0 : a.key[i] - b.key[i]; });
    const seen = {};
    const some = ranked.filter(({ e }) => {
      const page = e.item.href.split("#")[0];
      seen[page] = (seen[page] || 0) + 1;
      return seen[page] <= PER_PAGE;
    });
    return some.slice(0, (options && options.limit) || 20).map(({ e }) => ({ item: e.item, refIndex: e.place }));
  }
}
window.Fuse = Fuse;
