'use strict';

// What a copied Node draws from, and how each of it is made fresh in a fork.
//
//   OpenSSL      Each thread has generators of its own, below one primary. Each of them remembers the process that last seeded it, and
//                seeds itself anew, from the kernel in the end, when it finds itself in another one. A copied machine has the same
//                process ids, and Node has no function that stirs a generator. So that one number of each is found in this process'
//                memory, and is made wrong: before the capture by us, and in each fork before the thaw by the agent.
//   Node         keeps random bytes that it has not given out yet: 128 UUIDs, and 1024 numbers of randomInt. They are used up.
//   Math.random  is one of ours, in each context, because nobody can reach V8's own state.

const crypto = require('node:crypto');
const fs = require('node:fs');
const vm = require('node:vm');

const { randomFillSync, randomInt, randomUUID } = crypto;
const { readSync, writeSync } = fs;

// --- OpenSSL ---------------------------------------------------------------------------------------------------------

// A generator's state as OpenSSL 3.0 to 3.3 has it (prov_drbg_st, 64 bit): offsets in bytes.
const PROVIDER = 8; // the provider's context and four functions, alike in all that live: where one was freed, something else is here
const FUNCTIONS_END = 48;
const PARENT = 48; // pointer to the state that it is seeded from
const FORK_ID = 120; // the process that seeded it
const STRENGTH = 128; // 256, four bytes of padding, then the most bytes of one request, 65536
const INTERVAL = 196; // requests until it is seeded anew
const AGE = 208; // seconds until then
const STATE = 216;
const PRIMARY = { interval: 1 << 8, age: 60 * 60 };
const OF_A_THREAD = { interval: 1 << 16, age: 7 * 60 };

const CHUNK = 1 << 20;

/** Where glibc's `malloc` has its arenas: the program's heap, and ranges at multiples of this. V8's memory, most of all, is elsewhere. */
const ARENA = 64 << 20;

function arenas() {
  const found = [];
  for (const line of fs.readFileSync('/proc/self/maps', 'latin1').split('\n')) {
    const range = /^([0-9a-f]+)-([0-9a-f]+) rw-p \S+ \S+ 0 *(\[heap\])?$/.exec(line);
    if (range === null) continue;
    const [start, end] = [Number.parseInt(range[1], 16), Number.parseInt(range[2], 16)];
    // What lies right below an arena is one range with it.
    const first = range[3] === undefined ? Math.ceil(start / ARENA) * ARENA : start;
    if (first < end) found.push([first, end]);
  }
  return found;
}

class OpenSsl {
  constructor() {
    this.memory = -1;
    this.places = []; // where the states begin
    this.provider = ''; // what all of them have at PROVIDER
  }

  /** Finds the generators and marks them. Says what is wrong if that does not do what it is to do. */
  prepare() {
    this.places = [];
    try {
      if (this.memory < 0) this.memory = fs.openSync('/proc/self/mem', 'r+');
      randomFillSync(Buffer.alloc(1));
      this.find();
      if (this.places.length < 2) throw new Error('its generators are not where they should be');
      this.mark();
      // A draw must now seed this thread's generator and the primary.
      randomFillSync(Buffer.alloc(1));
      const seeded = this.places.filter((place) => this.forkId(place) === process.pid).length;
      if (seeded < 2) throw new Error('its generators do not seed themselves');
      this.mark();
      return null;
    } catch (error) {
      this.places = [];
      return `OpenSSL's generators can not be reseeded: ${error.message}`;
    }
  }

  find() {
    const primaries = new Map(); // place → provider
    const rest = [];
    for (const place of this.candidates()) {
      const state = this.state(place);
      if (state?.kind === PRIMARY) primaries.set(place, state.provider);
      else if (state?.kind === OF_A_THREAD) rest.push([place, state]);
    }
    // Those of a thread name their primary: what is not linked like that is something else, or was freed.
    const found = new Set();
    for (const [place, { parent, provider }] of rest) {
      if (primaries.get(parent) !== provider) continue;
      this.provider = provider;
      found.add(place).add(parent);
    }
    this.places = [...found];
  }

  /** Where something lies that looks like a state. */
  candidates() {
    const pattern = Buffer.alloc(16);
    pattern.writeUInt32LE(256, 0);
    pattern.writeUInt32LE(65536, 8);
    const chunk = Buffer.alloc(CHUNK);
    const found = [];
    for (const [start, end] of arenas()) {
      // Overlapping, so that the pattern lies in one piece.
      for (let at = start; at < end; at += CHUNK - 16) {
        let length;
        try {
          length = readSync(this.memory, chunk, 0, Math.min(CHUNK, end - at), at);
        } catch {
          break; // it is gone, or can not be read
        }
        const view = chunk.subarray(0, length);
        for (let hit = view.indexOf(pattern); hit >= 0; hit = view.indexOf(pattern, hit + 8)) {
          if ((at + hit) % 8 === 0) found.push(at + hit - STRENGTH);
        }
      }
    }
    // It lies in what was searched, and has had copies of what was found: they must not be taken for it, now or the next time.
    chunk.fill(0);
    return found;
  }

  /** What lies there, if it is a generator's state. */
  state(place) {
    const bytes = Buffer.alloc(STATE);
    try {
      if (readSync(this.memory, bytes, 0, STATE, place) !== STATE) return null;
      if (bytes.readUInt32LE(STRENGTH) !== 256 || bytes.readBigUInt64LE(STRENGTH + 8) !== 65536n) return null;
      const interval = bytes.readUInt32LE(INTERVAL);
      const age = Number(bytes.readBigUInt64LE(AGE));
      const kind = [PRIMARY, OF_A_THREAD].find((kind) => kind.interval === interval && kind.age === age);
      const provider = bytes.toString('hex', PROVIDER, FUNCTIONS_END);
      return { kind, provider, parent: Number(bytes.readBigUInt64LE(PARENT)) };
    } catch {
      return null;
    } finally {
      bytes.fill(0); // no copy is to be found
    }
  }

  /** Whoever draws next seeds its generator first. */
  mark() {
    const number = Buffer.alloc(4);
    number.writeInt32LE(~process.pid);
    for (let i = 0; i < this.places.length; i++) {
      // A thread that has ended has freed its own.
      const place = this.places[i];
      const state = this.state(place);
      if (state?.kind !== undefined && state.provider === this.provider) writeSync(this.memory, number, 0, 4, place + FORK_ID);
    }
  }

  forkId(place) {
    const number = Buffer.alloc(4);
    readSync(this.memory, number, 0, 4, place + FORK_ID);
    return number.readInt32LE();
  }

  /** For the agent: any other number than this process' does. */
  inPlace() {
    return this.places.map((place) => [place + FORK_ID, 4]);
  }
}

// --- what Node keeps -------------------------------------------------------------------------------------------------

const KEPT_UUIDS = 128;
const KEPT_INTS = 1024;

/** Waits until no bytes for `randomInt` are on their way that were drawn before now. */
function settled() {
  return new Promise((resolve) => randomInt(2, () => resolve()));
}

function useUp() {
  for (let i = 0; i < KEPT_UUIDS; i++) randomUUID();
  for (let i = 0; i < KEPT_INTS; i++) randomInt(2);
}

// --- Math.random -----------------------------------------------------------------------------------------------------

/**
 * Replaces a context's `Math.random` by xoshiro128**, and returns what seeds it. It is compiled in each context from its text, and takes
 * numbers only: nothing of another context gets into it.
 */
function takeMathRandom(math, define) {
  let a = 1, b = 0, c = 0, d = 0;
  const { imul } = math;
  const next = () => {
    const x = imul(b, 5);
    const result = imul((x << 7) | (x >>> 25), 9);
    const t = b << 9;
    c ^= a;
    d ^= b;
    b ^= c;
    a ^= d;
    c ^= t;
    d = (d << 11) | (d >>> 21);
    return result;
  };
  const { random } = { random() { return ((next() >>> 5) * 67108864 + (next() >>> 6)) / 9007199254740992; } };
  define(math, 'random', { value: random, writable: true, enumerable: false, configurable: true });
  return (...seed) => {
    a = seed[0];
    b = seed[1];
    c = seed[2];
    d = seed[3];
  };
}

const TAKE = new vm.Script(`'use strict'; (${takeMathRandom})(Math, Object.defineProperty)`, { filename: 'offshoot:Math.random' });

class MathRandom {
  constructor() {
    this.seeders = []; // weak references to what seeds a context's
    this.known = new WeakSet(); // contexts that have ours
  }

  add(seeder) {
    this.seed(seeder);
    this.seeders.push(new WeakRef(seeder));
  }

  seed(seeder) {
    const seed = new Int32Array(4);
    do randomFillSync(seed);
    while (!(seed[0] | seed[1] | seed[2] | seed[3])); // the one state that it never leaves
    seeder(seed[0], seed[1], seed[2], seed[3]);
  }

  /** Seeds all of them; returns how many. */
  reseed() {
    const live = [];
    for (let i = 0; i < this.seeders.length; i++) {
      const seeder = this.seeders[i].deref();
      if (seeder === undefined) continue;
      this.seed(seeder);
      live[live.length] = this.seeders[i];
    }
    this.seeders = live;
    return live.length;
  }

  /** This context's, and that of every context to come. */
  install() {
    this.own = TAKE.runInThisContext();
    this.add(this.own);
    const { createContext, isContext } = vm;
    const runInContext = vm.Script.prototype.runInContext;
    const enter = (context) => {
      if (!this.known.has(context)) {
        const seeder = Reflect.apply(runInContext, TAKE, [context]);
        this.known.add(context);
        this.kept ??= new WeakMap();
        this.kept.set(context, seeder); // it lives as long as its context
        this.add(seeder);
      }
      return context;
    };
    vm.createContext = function (object = {}, options = {}) {
      return isContext(object) ? object : enter(createContext(object, options));
    };
    const contextOptions = (options) => {
      const given = {
        name: options.contextName,
        origin: options.contextOrigin,
        codeGeneration: options.contextCodeGeneration,
        microtaskMode: options.microtaskMode,
      };
      for (const name of Object.keys(given)) if (given[name] === undefined) delete given[name];
      return given;
    };
    vm.Script.prototype.runInNewContext = function (object, options = {}) {
      return this.runInContext(vm.createContext(object, contextOptions(options)), options);
    };
    vm.runInNewContext = function (code, object, options = {}) {
      const all = typeof options === 'string' ? { filename: options } : options;
      return vm.runInContext(code, vm.createContext(object, contextOptions(all)), all);
    };
    require('node:module').syncBuiltinESMExports();
  }
}

module.exports = { MathRandom, OpenSsl, settled, useUp };
