'use strict';

// The warmed Node of a fork: answers `eval`, and becomes itself when the agent says who it is.
//
// User code runs here, in the main thread, as it would in Node's own console. The thread of lines.js speaks with the agent (docs/recipes.md
// describes how) and tells this one what to do, one thing at a time.
//
// From the answer to a `quiesce` on this thread is held: it waits in one system call, and goes on with the next request, which in a fork is
// its identity. So nothing of it, no timer and no answer from outside, runs in a fork before the fork is itself.

const crypto = require('node:crypto');
const fs = require('node:fs');
const inspector = require('node:inspector');
const { builtinModules, createRequire } = require('node:module');
const { resolve } = require('node:path');
const { Writable } = require('node:stream');
const { pathToFileURL } = require('node:url');
const { inspect, types } = require('node:util');
const v8 = require('node:v8');
const vm = require('node:vm');
const { MessageChannel, Worker, receiveMessageOnPort } = require('node:worker_threads');

const { MathRandom, OpenSsl, settled, useUp } = require('./randomness.js');

const SOURCE = 8; // the protocol's descriptors; see recipe.toml
const TARGET = 9;

const OUTPUT_LIMIT = 512 << 10; // bytes of each captured stream
const TEXT_LIMIT = 64 << 10; // of repr, message and stack
const VALUE_LIMIT = 4 << 20; // of a value's JSON
const DEPTH_LIMIT = 120; // the agent refuses deeper values
const SHORT = 256; // of what stands for a part that has no JSON form

// What user code may have replaced by the time that it is needed here.
const { apply } = Reflect;
const { is, keys } = Object;
const { isArray } = Array;
const { stringify } = JSON;
const { wait } = Atomics;
const forEach = { map: Map.prototype.forEach, set: Set.prototype.forEach };
const errorText = Error.prototype.toString;
const { writeSync } = fs;
const { exit } = process;
const { runInNewContext } = vm;

const log = (text) => {
  try {
    writeSync(2, `${text}\n`);
  } catch {
    // Nobody reads it any more.
  }
};

// --- what user code prints -------------------------------------------------------------------------------------------

/** `process.stdout` or `process.stderr`: into the answer while an evaluation runs, into the log otherwise. */
class Output extends Writable {
  constructor(fd) {
    super({ decodeStrings: true });
    this.fd = fd;
    this.isTTY = false;
    this.captured = null;
  }

  _write(data, _encoding, done) {
    const { captured } = this;
    if (captured === null) {
      try {
        writeSync(2, data);
      } catch {
        // Nobody reads it any more.
      }
    } else {
      const room = OUTPUT_LIMIT - this.size;
      if (data.length > room) this.lost += data.length - room;
      const taken = data.subarray(0, room);
      captured[captured.length] = Buffer.from(taken); // its owner may write to it again
      this.size += taken.length;
    }
    done();
  }

  // They are the process', whatever a library does with them.
  end(...rest) {
    if (rest.length > 0 && typeof rest[0] !== 'function') this.write(...rest);
    return this;
  }

  destroy() {
    return this;
  }

  start() {
    this.captured = [];
    this.size = 0;
    this.lost = 0;
  }

  stop() {
    const { captured, lost } = this;
    this.captured = null;
    const text = captured === null ? '' : Buffer.concat(captured).toString();
    return lost > 0 ? `${text}\n[${lost} more bytes were printed]\n` : text;
  }
}

const stdout = new Output(1);
const stderr = new Output(2);

// --- values as text --------------------------------------------------------------------------------------------------

class TooLarge extends Error {}

const cut = (text, limit) => (text.length > limit ? `${text.slice(0, limit)}…` : text);

function describe(value, limit = TEXT_LIMIT) {
  try {
    return cut(inspect(value, { showProxy: true }), limit);
  } catch {
    return `<${typeof value} that can not be shown>`;
  }
}

const LONE = /\p{Surrogate}/u;
const test = RegExp.prototype.test;

/**
 * The JSON of a value, in which NaN and the infinities stand for themselves. A part that has no JSON form is an object with the one member
 * `$js`, which says what it is as Node shows it; no other object has a member of this name.
 */
class Form {
  constructor() {
    this.size = 0;
    this.path = []; // the objects around this one
  }

  of(value) {
    const text = this.text(value);
    // By itself it is null, and its repr speaks for it.
    return text === null ? 'null' : text;
  }

  /** A part of an array or object. */
  part(read) {
    let value;
    try {
      value = read();
    } catch (error) {
      return this.opaque(`<throws ${failure(error).message}>`);
    }
    return this.text(value) ?? this.opaque(describe(value, SHORT));
  }

  opaque(text) {
    return this.count(`{"$js":${stringify(text.replace(/\p{Surrogate}/gu, '\ufffd'))}}`);
  }

  count(text) {
    this.size += text.length;
    if (this.size > VALUE_LIMIT) throw new TooLarge(`the value has more than ${VALUE_LIMIT} bytes; answer with a part of it`);
    return text;
  }

  /** Null if it has no form. */
  text(value) {
    switch (typeof value) {
      case 'string':
        return value.length <= VALUE_LIMIT && apply(test, LONE, [value]) ? null : this.count(stringify(value));
      case 'number':
        return this.count(is(value, -0) ? '-0' : `${value}`);
      case 'boolean':
        return this.count(`${value}`);
      case 'object':
        return value === null ? this.count('null') : this.object(value);
      default:
        return null;
    }
  }

  object(value) {
    const { path } = this;
    // A proxy is whatever its handler says, each time anew.
    if (types.isProxy(value)) return null;
    for (let i = 0; i < path.length; i++) if (path[i] === value) return this.opaque('[Circular]');
    if (path.length === DEPTH_LIMIT) throw new TooLarge('the value is nested too deep; its repr may do');
    path[path.length] = value;
    const text = this.members(value);
    path.length -= 1;
    return text;
  }

  members(value) {
    if (isArray(value)) return this.list(value.length, (i) => value[i]);
    if (types.isTypedArray(value)) {
      return types.isBigInt64Array(value) || types.isBigUint64Array(value) ? null : this.list(value.length, (i) => value[i]);
    }
    if (types.isMap(value)) {
      const pairs = [];
      apply(forEach.map, value, [(member, key) => { pairs[pairs.length] = [key, member]; }]);
      return this.list(pairs.length, (i) => pairs[i]);
    }
    if (types.isSet(value)) {
      const members = [];
      apply(forEach.set, value, [(member) => { members[members.length] = member; }]);
      return this.list(members.length, (i) => members[i]);
    }
    if (isOpaque(value)) return null;
    let names;
    try {
      const { toJSON } = value;
      if (typeof toJSON === 'function') {
        const json = apply(toJSON, value, ['']);
        // What it says of an invalid date is not that there is none.
        return types.isDate(value) && json === null ? null : this.text(json);
      }
      names = keys(value);
    } catch {
      return null;
    }
    let text = '{';
    for (let i = 0; i < names.length; i++) {
      const name = names[i];
      if (name === '$js' || apply(test, LONE, [name])) return null;
      const member = this.part(() => value[name]);
      text += `${i > 0 ? ',' : ''}${this.count(stringify(name))}:${member}`;
    }
    return `${text}}`;
  }

  list(length, member) {
    let text = '[';
    for (let i = 0; i < length; i++) text += `${i > 0 ? ',' : ''}${this.part(() => member(i))}`;
    return `${text}]`;
  }
}

function isOpaque(value) {
  return (
    types.isAnyArrayBuffer(value) || types.isBoxedPrimitive(value) || types.isDataView(value) || types.isExternal(value) ||
    types.isGeneratorObject(value) || types.isNativeError(value) || types.isPromise(value) || types.isRegExp(value) ||
    types.isWeakMap(value) || types.isWeakSet(value)
  );
}

const hasFrame = RegExp.prototype.test.bind(/\n {4}at /);

/** Stacks end where this bridge begins. (Node's own console does the same.) */
function prepareStackTrace(error, frames) {
  let text;
  try {
    text = apply(errorText, error, []);
  } catch {
    text = 'Error';
  }
  for (let i = 0; i < frames.length; i++) {
    const file = frames[i].getFileName();
    if (file === 'node:inspector' || file === __filename) break;
    text += `\n    at ${frames[i]}`;
  }
  return text;
}

/** What is answered of something that was thrown. */
function failure(thrown, place = '') {
  if (!types.isNativeError(thrown)) return { message: cut(`Uncaught ${describe(thrown)}`, TEXT_LIMIT), stack: '' };
  let message;
  try {
    message = cut(apply(errorText, thrown, []), TEXT_LIMIT);
  } catch {
    message = 'Error';
  }
  const stack = describe(thrown);
  if (hasFrame(stack)) return { message, stack };
  return { message, stack: place === '' ? message : `${message}\n    at ${place}` };
}

// --- evaluation ------------------------------------------------------------------------------------------------------

let port; // to the thread of lines.js
let current = null; // the number of the evaluation in progress

const session = new inspector.Session();
let taken;
let taker;

/** Gives this file the value that the inspector speaks of. */
function connect() {
  session.connect();
  const name = `offshoot ${process.pid}`;
  globalThis[name] = (value) => { taken = value; };
  session.post('Runtime.evaluate', { expression: `globalThis[${stringify(name)}]` }, (error, reply) => {
    if (error) throw error;
    taker = reply.result.objectId;
  });
  delete globalThis[name];
}

function take(remote) {
  const argument = {};
  if ('objectId' in remote) argument.objectId = remote.objectId;
  else if ('unserializableValue' in remote) argument.unserializableValue = remote.unserializableValue;
  else if ('value' in remote) argument.value = remote.value;
  taken = undefined;
  session.post('Runtime.callFunctionOn', {
    objectId: taker,
    functionDeclaration: 'function (value) { this(value); }',
    arguments: [argument],
    silent: true,
  });
  const value = taken;
  taken = undefined;
  return value;
}

function evaluate(number, code) {
  current = number;
  stdout.start();
  stderr.start();
  const name = `<eval-${number}>`;
  const lines = code.split('\n').length;
  // As in the console of DevTools: top-level await, and names may be declared again.
  const request = {
    expression: `${code}\n//# sourceURL=${name}`,
    replMode: true,
    awaitPromise: true,
    objectGroup: 'evaluation',
  };
  session.post('Runtime.evaluate', request, (error, reply) => {
    if (current !== number) return; // it was given up
    let answer;
    if (error) {
      answer = { message: 'the request was interrupted', stack: '' };
    } else {
      try {
        const value = take(reply.result);
        const { exceptionDetails: thrown } = reply;
        answer = thrown
          ? failure(value, thrown.lineNumber < lines ? `${name}:${thrown.lineNumber + 1}:${thrown.columnNumber + 1}` : '')
          : { value: new Form().of(value), repr: describe(value) };
      } catch (problem) {
        answer = problem instanceof TooLarge ? { tooLarge: problem.message } : failure(problem);
      }
    }
    current = null;
    answer.number = number;
    answer.stdout = stdout.stop();
    answer.stderr = stderr.stop();
    port.postMessage(answer);
    session.post('Runtime.releaseObjectGroup', { objectGroup: 'evaluation' });
    session.post('Runtime.discardConsoleEntries'); // the inspector keeps what was printed, with all it refers to
  });
}

function forget(number) {
  if (current !== number) return;
  current = null;
  stdout.stop();
  stderr.stop();
}

// --- identity --------------------------------------------------------------------------------------------------------

const callbacks = [];

const guest = {
  /** Who this fork is: { id, name, hostname, template }; null in a template. */
  fork: null,
  /** Loads an ECMAScript module. (`import()` itself is not to be had in evaluated code.) */
  import: importModule,
  /** Calls `callback(fork)` in every fork before its first request, to refresh what only you know of. It may be asynchronous. */
  onIdentity(callback) {
    if (typeof callback !== 'function') throw new TypeError('onIdentity takes a function');
    callbacks[callbacks.length] = callback;
    return callback;
  },
};

/** What `import(specifier)` would be, which evaluated code does not have. */
function importModule(specifier) {
  return import(/^\.{0,2}\//.test(specifier) ? pathToFileURL(resolve(specifier)).href : specifier);
}

const openssl = new OpenSsl();
const mathRandom = new MathRandom();

let given = []; // names of variables that the last identity set
const cell = new Int32Array(new SharedArrayBuffer(4)); // not 0: there is a message for a thread that is held

function become(fork, env) {
  openssl.mark();
  useUp();
  const contexts = mathRandom.reseed();
  const names = keys(env);
  for (let i = 0; i < names.length; i++) {
    // The C library would take the value up to there.
    if (env[names[i]].includes('\0')) throw new Error(`the value of ${names[i]} has a zero byte in it`);
    process.env[names[i]] = env[names[i]];
  }
  for (let i = 0; i < given.length; i++) if (!(given[i] in env)) delete process.env[given[i]];
  given = names;
  guest.fork = fork;
  return contexts;
}

function reported(contexts) {
  const report = { random: `reseeded-${contexts}`, environ: 'set' };
  if (openssl.places.length > 0) report.openssl = `reseeded-${openssl.places.length}`;
  return report;
}

async function identity({ number, fork, env }) {
  try {
    const report = reported(become(fork, env));
    for (let i = 0; i < callbacks.length; i++) await callbacks[i](fork);
    if (callbacks.length > 0) report.callbacks = `ran-${callbacks.length}`;
    port.postMessage({ number, report });
  } catch (error) {
    port.postMessage({ number, ...failure(error) });
  }
}

/** Collects what is garbage, so that forks neither have it nor collect it each. */
function collect() {
  v8.setFlagsFromString('--expose-gc');
  runInNewContext('gc')();
  v8.setFlagsFromString('--no-expose-gc');
}

async function quiesce(number) {
  await settled();
  collect();
  const problem = openssl.prepare();
  const report = {};
  if (problem !== null) {
    log(problem);
    report.uncovered = 'openssl';
  }
  // Its code, so that it is compiled in the template.
  useUp();
  const contexts = mathRandom.reseed();
  openssl.mark();
  // What is drawn from now on until the freeze is found out by the agent's own marks, if it can make them.
  const inPlace =
    problem === null && callbacks.length === 0 ? { memory: openssl.inPlace(), report: reported(contexts) } : null;
  cell[0] = 0;
  port.postMessage({ number, report, inPlace });
  let received;
  do {
    wait(cell, 0, 0);
    cell[0] = 0;
    received = receiveMessageOnPort(port);
  } while (received === undefined);
  onMessage(received.message);
}

// --- the loop --------------------------------------------------------------------------------------------------------

function onMessage(message) {
  switch (message.kind) {
    case 'eval':
      return evaluate(message.number, message.code);
    case 'forget':
      return forget(message.number);
    case 'ping':
      return port.postMessage({ number: message.number });
    case 'quiesce':
      return void quiesce(message.number).catch((error) => port.postMessage({ number: message.number, ...failure(error) }));
    case 'identity':
      return void identity(message);
    case 'continue':
      return port.postMessage({ number: message.number, report: {} });
    case 'exit':
      return exit(message.code);
  }
}

/** What code finds that is typed into Node's own console. */
function furnish() {
  const define = (object, name, value) =>
    Object.defineProperty(object, name, { value, writable: true, enumerable: false, configurable: true });
  const require = createRequire(`${process.cwd()}/`);
  define(globalThis, 'require', require);
  for (const name of builtinModules) {
    if (name.startsWith('_') || name.includes('/') || name in globalThis) continue;
    Object.defineProperty(globalThis, name, {
      get: () => require(name),
      set: (value) => define(globalThis, name, value),
      enumerable: false,
      configurable: true,
    });
  }
  define(globalThis, 'crypto', crypto); // and not the Web's, which newer versions have there
  define(globalThis, 'offshootGuest', guest);
  define(process, 'stdout', stdout);
  define(process, 'stderr', stderr);
  process.argv.length = 1;
}

function main() {
  const warm = process.env.OFFSHOOT_WARM ?? '';
  delete process.env.OFFSHOOT_WARM;
  mathRandom.install();
  furnish();
  connect();
  Error.prepareStackTrace = prepareStackTrace;
  // The runtime outlives its requests, and what they leave behind.
  process.on('uncaughtException', (error, origin) => log(`${origin}: ${failure(error).stack || describe(error)}`));

  // A port of its own: that of a worker can not be asked for a message while this thread is held.
  const channel = new MessageChannel();
  port = channel.port1;
  port.on('message', onMessage);
  const lines = new Worker(require.resolve('./lines.js'), {
    argv: [],
    execArgv: [],
    resourceLimits: { maxOldGenerationSizeMb: 96, maxYoungGenerationSizeMb: 4 },
    workerData: { cell, port: channel.port2, source: SOURCE, target: TARGET, warm },
    transferList: [channel.port2],
  });
  lines.on('error', (error) => {
    log(`the bridge failed: ${error.stack}`);
    exit(1);
  });
  lines.on('exit', () => exit(0));
}

main();
