"use strict";
// What a page asks of its graphs: who hears whom, through how many layers, and which pixels of the mask have edges.
// A graph is runs of keys of each query: first key, how many, and the step from one to the next. Nothing here touches
// the document: it runs in the page, in a worker, and in the tests.

const Engine = (() => {
  const CIRCLES = 64; // nodes that are drawn one by one
  const MOST_KEYS = 4096; // of a query that are told, evenly chosen of more

  // ------------------------------------------------------------------------------------------------- from the data

  /** Numbers of Python's `packed`: zigzag variable-length integers, in base64. */
  function unpack(text, isDelta = false) {
    const raw = atob(text),
      found = [];
    for (let at = 0, last = 0; at < raw.length;) {
      let value = 0,
        scale = 1,
        byte;
      do {
        byte = raw.charCodeAt(at++);
        value += (byte & 127) * scale;
        scale *= 128;
      } while (byte & 128);
      value = value % 2 ? -(value + 1) / 2 : value / 2;
      if (isDelta) value = last += value;
      found.push(value);
    }
    return found;
  }

  /** The runs of a part, sorted by queries: those of query q are from at[q] to at[q + 1]. */
  function rows(part, n, m) {
    const cells = part.cells.map(column => unpack(column)),
      count = new Int32Array(n + 1);
    const [top, bottom, left, right, low, high, residue, period] = cells,
      pieces = [];
    for (let c = 0; c < top.length; c++) {
      for (let q = top[c]; q < bottom[c]; q++) {
        const p = period[c],
          least = low[c] + ((((residue[c] - low[c]) % p) + p) % p);
        let first = q + least,
          last = q + high[c] - 1;
        if (first < left[c]) first += Math.ceil((left[c] - first) / p) * p;
        if (last > right[c] - 1) last = right[c] - 1;
        if (first > last) continue;
        pieces.push(q, first, Math.floor((last - first) / p) + 1, p);
        count[q + 1]++;
      }
    }
    const runs = unpack(part.runs[0]),
      key = unpack(part.runs[1]),
      length = unpack(part.runs[2]);
    for (let q = 0, r = 0; q < n && runs.length; q++) {
      for (let end = 0, i = 0; i < runs[q]; i++, r++) {
        pieces.push(q, end + key[r], length[r] + 1, 1);
        end += key[r] + length[r] + 1;
        count[q + 1]++;
      }
    }
    for (let q = 0; q < n; q++) count[q + 1] += count[q];
    const total = count[n],
      found = {
        n,
        m,
        at: count,
        key: new Int32Array(total),
        length: new Int32Array(total),
        step: new Int32Array(total),
      };
    const next = count.slice();
    for (let i = 0; i < pieces.length; i += 4) {
      const r = next[pieces[i]]++;
      found.key[r] = pieces[i + 1];
      found.length[r] = pieces[i + 2];
      found.step[r] = pieces[i + 3];
    }
    const lacking = new Map(),
      queries = unpack(part.less[0], true),
      keys = unpack(part.less[1]);
    queries.forEach((q, i) => lacking.set(q, [...(lacking.get(q) || []), keys[i]]));
    return lacking.size ? without(found, lacking) : found;
  }

  /** The same without some edges, as a map from queries to keys. */
  function without(graph, lacking) {
    const queries = [],
      key = [],
      length = [],
      step = [];
    for (let q = 0; q < graph.n; q++) {
      const missing = lacking.get(q);
      if (!missing) {
        for (let r = graph.at[q]; r < graph.at[q + 1]; r++) {
          queries.push(q);
          key.push(graph.key[r]);
          length.push(graph.length[r]);
          step.push(graph.step[r]);
        }
        continue;
      }
      const row = new Uint8Array(graph.m + 1);
      eachKey(graph, q, k => {
        row[k] = 1;
      });
      for (const k of missing) row[k] = 0;
      for (let k = 0, start = -1; k <= graph.m; k++) {
        if (row[k] && start < 0) start = k;
        if (!row[k] && start >= 0) {
          queries.push(q);
          key.push(start);
          length.push(k - start);
          step.push(1);
          start = -1;
        }
      }
    }
    const at = new Int32Array(graph.n + 1);
    for (const q of queries) at[q + 1]++;
    for (let q = 0; q < graph.n; q++) at[q + 1] += at[q];
    return {
      n: graph.n,
      m: graph.m,
      at,
      key: Int32Array.from(key),
      length: Int32Array.from(length),
      step: Int32Array.from(step),
    };
  }

  // -------------------------------------------------------------------------------------------------- one graph

  function eachKey(graph, query, visit) {
    for (let r = graph.at[query]; r < graph.at[query + 1]; r++) {
      for (let i = 0, k = graph.key[r]; i < graph.length[r]; i++, k += graph.step[r]) visit(k);
    }
  }

  function hears(graph, query, key) {
    for (let r = graph.at[query]; r < graph.at[query + 1]; r++) {
      const beyond = key - graph.key[r],
        step = graph.step[r];
      if (beyond >= 0 && beyond % step === 0 && beyond / step < graph.length[r]) return true;
    }
    return false;
  }

  function edges(graph) {
    let total = 0;
    for (const length of graph.length) total += length;
    return total;
  }

  /** The keys that any of these queries hears, added to a set: all ends of runs are counted, then summed up. */
  function keysOf(graph, queries, into) {
    const changes = new Map();
    for (const q of queries) {
      for (let r = graph.at[q]; r < graph.at[q + 1]; r++) {
        const step = graph.step[r];
        if (!changes.has(step)) changes.set(step, new Int32Array(graph.m + step));
        const change = changes.get(step);
        change[graph.key[r]]++;
        change[graph.key[r] + graph.length[r] * step]--;
      }
    }
    for (const [step, change] of changes) {
      for (let k = 0; k < graph.m; k++) {
        if (k >= step) change[k] += change[k - step];
        if (change[k]) into[k] = 1;
      }
    }
  }

  /** The queries that hear any of a set of keys, added to a set. */
  function queriesOf(graph, keys, into) {
    const sums = new Map();
    for (let q = 0; q < graph.n; q++) {
      for (let r = graph.at[q]; !into[q] && r < graph.at[q + 1]; r++) {
        const step = graph.step[r],
          first = graph.key[r],
          last = first + (graph.length[r] - 1) * step;
        if (!sums.has(step)) {
          const sum = new Int32Array(graph.m);
          for (let k = 0; k < graph.m; k++) sum[k] = keys[k] + (k >= step ? sum[k - step] : 0);
          sums.set(step, sum);
        }
        const sum = sums.get(step);
        if (sum[last] > (first >= step ? sum[first - step] : 0)) into[q] = 1;
      }
    }
  }

  /** The first edge by which the future is heard, as {query, key}; null where it is not. */
  function leak(graph) {
    for (let q = 0; q < graph.n; q++) {
      let key = Infinity;
      for (let r = graph.at[q]; r < graph.at[q + 1]; r++) {
        const step = graph.step[r],
          first = graph.key[r],
          last = first + (graph.length[r] - 1) * step;
        if (last > q) key = Math.min(key, first > q ? first : first + Math.floor((q - first) / step + 1) * step);
      }
      if (key < Infinity) return { query: q, key };
    }
    return null;
  }

  /** The last query that hears each key, or -1: from the last query on, whose keys are passed over afterwards. */
  function lastReader(graph) {
    const last = new Int32Array(graph.m).fill(-1),
      nexts = new Map();
    for (let q = graph.n - 1; q >= 0; q--) {
      for (let r = graph.at[q]; r < graph.at[q + 1]; r++) {
        const step = graph.step[r],
          end = graph.key[r] + graph.length[r] * step;
        if (!nexts.has(step))
          nexts.set(
            step,
            Int32Array.from({ length: graph.m + step }, (_, k) => k),
          );
        const next = nexts.get(step);
        const open = k => {
          while (next[k] !== k) {
            next[k] = next[next[k]];
            k = next[k];
          }
          return k;
        };
        for (let k = open(graph.key[r]); k < end; k = open(k)) {
          if (last[k] < q) last[k] = q;
          next[k] = Math.min(k + step, graph.m + step - 1);
        }
      }
    }
    return last;
  }

  // -------------------------------------------------------------------------------------------------- a stack

  const members = set => {
    const found = [];
    for (let i = 0; i < set.length; i++) if (set[i]) found.push(i);
    return found;
  };

  /** Who is reached from a node that stands after `row` layers: a set for each row, from the inputs to the outputs.
   *  Above, whom it hears through the layers before; below, who hears it through those that follow. */
  function spread(layers, row, node) {
    const sizes = [layers[0].m, ...layers.map(graph => graph.n)],
      fields = sizes.map(size => new Uint8Array(size));
    const isStack = sizes.every(size => size === sizes[0]); // then there are residual streams
    fields[row][node] = 1;
    const asked = new Map();
    for (let l = row - 1; l >= 0; l--) {
      const graph = layers[l],
        done = asked.get(graph),
        queries = [];
      for (let q = 0; q < graph.n; q++) if (fields[l + 1][q] && !(isStack && done && done[q])) queries.push(q);
      if (isStack) {
        fields[l].set(fields[l + 1]);
        // what this graph's earlier queries hear is in the field already: fields only grow
        asked.set(graph, fields[l + 1]);
      }
      keysOf(graph, queries, fields[l]);
    }
    for (let l = row; l < layers.length; l++) {
      if (isStack) fields[l + 1].set(fields[l]);
      queriesOf(layers[l], fields[l], fields[l + 1]);
    }
    return fields;
  }

  const count = set => {
    let total = 0;
    for (let i = 0; i < set.length; i++) total += set[i];
    return total;
  };

  // -------------------------------------------------------------------------------------------------- pictures

  /** The share of a set in each of some pixels that nodes lie in, side by side: Float32Array. */
  function inPixels(set, across) {
    const found = new Float32Array(across),
      scale = set.length / across;
    for (let p = 0; p < across; p++) {
      const first = Math.floor(p * scale),
        stop = Math.max(first + 1, Math.floor((p + 1) * scale));
      let total = 0;
      for (let i = first; i < stop; i++) total += set[i];
      found[p] = total / (stop - first);
    }
    return found;
  }

  /** The share of pairs in each pixel that are edges, of queries top … bottom and keys left … right: Float32Array. */
  function coverage(graphs, view, width, height) {
    const { top, bottom, left, right } = view,
      found = new Float32Array(width * height);
    const perRow = (bottom - top) / height,
      perColumn = (right - left) / width;
    const line = new Float64Array(width),
      change = new Float64Array(width + 1);
    const add = (start, stop, weight) => {
      // of keys, as real numbers
      const a = Math.max(0, (start - left) / perColumn),
        b = Math.min(width, (stop - left) / perColumn);
      if (a >= b) return;
      const i = Math.floor(a),
        j = Math.min(Math.floor(b), width - 1);
      if (i === j) {
        line[i] += (b - a) * weight;
        return;
      }
      line[i] += (i + 1 - a) * weight;
      line[j] += (b - j) * weight;
      change[i + 1] += weight;
      change[j] -= weight;
    };
    const drawRow = (q, weight) => {
      for (const graph of graphs) {
        for (let r = graph.at[q]; r < graph.at[q + 1]; r++) {
          const key = graph.key[r],
            step = graph.step[r],
            stop = key + (graph.length[r] - 1) * step + 1;
          if (step === 1) add(key, stop, weight);
          else if (step <= perColumn / 2)
            add(key, stop, weight / step); // finer than a pixel: evenly
          else {
            const skipped = Math.max(0, Math.ceil((left - key) / step));
            for (let k = key + skipped * step; k < Math.min(stop, right); k += step) add(k, k + 1, weight);
          }
        }
      }
    };
    for (let y = 0; y < height; y++) {
      const a = top + y * perRow,
        b = a + perRow;
      line.fill(0);
      change.fill(0);
      for (let q = Math.max(0, Math.floor(a)); q < Math.min(b, graphs[0].n); q++) {
        drawRow(q, (Math.min(b, q + 1) - Math.max(a, q)) / perRow / graphs.length);
      }
      for (let x = 0, inside = 0; x < width; x++) {
        inside += change[x];
        found[y * width + x] = Math.min(1, line[x] + inside);
      }
    }
    return found;
  }

  // ------------------------------------------------------------------------------------- the questions of a page

  /** Edges of several graphs as one. */
  function union(graphs) {
    if (graphs.length === 1) return graphs[0];
    const { n, m } = graphs[0],
      at = new Int32Array(n + 1),
      key = [],
      length = [],
      step = [];
    for (let q = 0; q < n; q++) {
      if (m <= CIRCLES) {
        // each edge once, as they are drawn one by one
        const keys = new Set();
        for (const graph of graphs) eachKey(graph, q, k => keys.add(k));
        for (const k of keys) {
          key.push(k);
          length.push(1);
          step.push(1);
        }
      } else
        for (const graph of graphs) {
          for (let r = graph.at[q]; r < graph.at[q + 1]; r++) {
            key.push(graph.key[r]);
            length.push(graph.length[r]);
            step.push(graph.step[r]);
          }
        }
      at[q + 1] = key.length;
    }
    return { n, m, at, key: Int32Array.from(key), length: Int32Array.from(length), step: Int32Array.from(step) };
  }

  /** The answers about a page's data; heads: a number, or null for those of any. */
  class Answers {
    constructor({ n, m, parts, graphs, layers }) {
      Object.assign(this, { n, m, parts, graphs, layers, found: new Map() });
      this.isKnown = graphs.every(graph => graph.parts.length && graph.parts.every(part => parts[part].cells));
    }

    once(name, make) {
      if (!this.found.has(name)) this.found.set(name, make());
      return this.found.get(name);
    }

    part(index) {
      return this.once(`part ${index}`, () => rows(this.parts[index], this.n, this.m));
    }

    graph(index, head) {
      const { parts } = this.graphs[index];
      const own = head === null || parts.length === 1 ? parts : [parts[head]];
      return this.once(`graph ${index} ${own}`, () => union([...new Set(own)].map(part => this.part(part))));
    }

    stack(head) {
      return this.layers.map(index => this.graph(index, head));
    }

    /** Whom a node hears, in the rows before its own, and who hears it, in those after: how many, and, of few nodes,
     *  which; of many, the share of those in each of `across` pixels. And its own keys. */
    spread({ row, node, head, across }) {
      const layers = this.stack(head),
        fields = spread(layers, row, node),
        own = new Uint8Array(this.m);
      if (row > 0) keysOf(layers[row - 1], [node], own);
      const all = members(own),
        every = Math.ceil(all.length / MOST_KEYS),
        keys = every > 1 ? all.filter((_, i) => i % every === 0) : all;
      const isSmall = Math.max(this.n, this.m) <= CIRCLES,
        found = { keys, degree: all.length, sizes: fields.map(count) };
      return isSmall ? { ...found, fields } : { ...found, shares: fields.map(field => inPixels(field, across)) };
    }

    /** The mask of a graph, in pixels. */
    mask({ graph, head, view, width, height }) {
      const { parts } = this.graphs[graph];
      const own = head === null || parts.length === 1 ? parts : [parts[head]];
      if (this.parts[own[0]].shape) return this.shares(own, view, width, height);
      return coverage(
        own.map(part => this.part(part)),
        view,
        width,
        height,
      );
    }

    /** The same of graphs of which only the share in some cells is known. */
    shares(own, { top, bottom, left, right }, width, height) {
      const found = new Float32Array(width * height);
      for (const index of own) {
        const {
            shares,
            shape: [down, across],
          } = this.parts[index],
          raw = atob(shares);
        for (let y = 0; y < height; y++) {
          const i = Math.floor((top + ((bottom - top) * (y + 0.5)) / height) / Math.ceil(this.n / down));
          for (let x = 0; x < width; x++) {
            const j = Math.floor((left + ((right - left) * (x + 0.5)) / width) / Math.ceil(this.m / across));
            found[y * width + x] += (raw.charCodeAt(i * across + j) || 0) / 255 / own.length;
          }
        }
      }
      return found;
    }

    /** Whether a query hears a key. */
    hears({ graph, head, query, key }) {
      return hears(this.graph(graph, head), query, key);
    }

    /** For each layer that hears the future, its first edge by which it does. */
    leaks() {
      if (this.n !== this.m) return [];
      const of = this.graphs.map((_, index) => (this.layers.includes(index) ? leak(this.graph(index, null)) : null));
      return this.layers.flatMap((index, layer) => (of[index] ? [{ layer, ...of[index] }] : []));
    }
  }

  return {
    CIRCLES,
    Answers,
    unpack,
    rows,
    eachKey,
    hears,
    edges,
    keysOf,
    queriesOf,
    leak,
    lastReader,
    spread,
    coverage,
    members,
  };
})();
if (typeof module !== "undefined") module.exports = Engine;
if (typeof WorkerGlobalScope !== "undefined") {
  let answers = null;
  onmessage = ({ data: { number, question, about } }) => {
    if (question === "load") answers = new Engine.Answers(about);
    else postMessage({ number, answer: answers[question](about) });
  };
}
