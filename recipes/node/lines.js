'use strict';

// The thread that speaks with the agent, so that user code, whatever it does, does not: it reads requests, has the main thread do them,
// and answers. It also ends what the main thread does when the agent says that it is late.

const fs = require('node:fs');
const inspector = require('node:inspector');
const net = require('node:net');
const { workerData } = require('node:worker_threads');

const { cell, port, source, target, warm } = workerData;

const LINE_LIMIT = 4 << 20; // bytes, both directions; the agent refuses more
const TEXT_LIMIT = 64 << 10;
const PATIENCE_MS = 500; // for a main thread that does nothing to say so

const log = (text) => fs.writeSync(2, `${text}\n`);

// --- the protocol ----------------------------------------------------------------------------------------------------

function send(text) {
  const data = Buffer.from(`${text}\n`);
  for (let sent = 0; sent < data.length; ) sent += fs.writeSync(target, data, sent);
}

/** Calls back with each line, one after the other is done. */
function readLines(handle) {
  const input = new net.Socket({ fd: source, readable: true, writable: false });
  let parts = [];
  let length = 0;
  let work = Promise.resolve();
  const end = () => {
    work = work.then(() => process.exit());
  };
  input.on('data', (data) => {
    for (;;) {
      const at = data.indexOf(10);
      if (at < 0) break;
      const line = Buffer.concat([...parts, data.subarray(0, at)]).toString();
      [parts, length, data] = [[], 0, data.subarray(at + 1)];
      work = work.then(() => handle(line));
    }
    parts.push(data);
    length += data.length;
    if (length > LINE_LIMIT) end();
  });
  input.on('end', end);
  input.on('error', end);
}

// --- the main thread -------------------------------------------------------------------------------------------------

const waiting = new Map(); // what is asked, by its number

port.on('message', (answer) => {
  const resolve = waiting.get(answer.number);
  waiting.delete(answer.number);
  // Absent: an answer that nobody waits for any more.
  resolve?.(answer);
});

function tell(message) {
  port.postMessage(message);
  // It may be held, and then does not look at its messages.
  Atomics.store(cell, 0, 1);
  Atomics.notify(cell, 0);
}

function ask(message) {
  return new Promise((resolve) => {
    waiting.set(message.number, resolve);
    tell(message);
  });
}

/** Whether a promise is kept in time. */
function within(promise) {
  return new Promise((resolve) => {
    const timer = setTimeout(() => resolve(false), PATIENCE_MS);
    promise.then(() => {
      clearTimeout(timer);
      resolve(true);
    });
  });
}

let current = null; // the number of the evaluation in progress

/** Ends the evaluation in progress, also one that never comes back to its event loop. */
async function interrupt() {
  const number = current;
  if (number === null) return;
  current = null; // once
  const evaluation = new Promise((resolve) => {
    const answered = waiting.get(number);
    waiting.set(number, (answer) => {
      answered(answer);
      resolve();
    });
  });
  if (!(await within(ask({ kind: 'ping', number: 'ping' })))) {
    const session = new inspector.Session();
    session.connectToMainThread();
    await within(Promise.race([evaluation, new Promise((resolve) => session.post('Runtime.terminateExecution', resolve))]));
    await within(evaluation);
    session.disconnect();
    // If it was idle by then, what it does next is ended instead, and that must be no request.
    await within(ask({ kind: 'ping', number: 'ping' }));
  }
  // It waits for something that may never come: it may go on, but nobody waits for it.
  if (waiting.has(number)) {
    tell({ kind: 'forget', number });
    waiting.get(number)({ number, message: 'the request was interrupted', stack: '', stdout: '', stderr: '' });
    waiting.delete(number);
  }
}

function watchInterrupts() {
  // There is no other way to a signal outside of the main thread, which may be busy.
  process.noDeprecation = true;
  const { Signal } = process.binding('signal_wrap');
  const signal = new Signal();
  signal.unref();
  signal.onsignal = () => void interrupt();
  const failed = signal.start(require('node:os').constants.signals.SIGINT);
  if (failed) throw new Error(`SIGINT can not be watched: error ${failed}`);
}

// --- requests --------------------------------------------------------------------------------------------------------

const quote = (text) => JSON.stringify(text.toWellFormed?.() ?? text.replace(/\p{Surrogate}/gu, '\ufffd'));

function tail(type, id, body, out, err) {
  return `{"type":"${type}","id":${id},${body},"stdout":${quote(out)},"stderr":${quote(err)}}`;
}

function tooLarge(id, message, out, err) {
  return tail('error', id, `"kind":"too-large","message":${quote(message)},"stack":""`, out.slice(0, TEXT_LIMIT), err.slice(0, TEXT_LIMIT));
}

function resultLine(id, answer) {
  const { stdout, stderr } = answer;
  if (answer.tooLarge !== undefined) return tooLarge(id, answer.tooLarge, stdout, stderr);
  const line =
    answer.value === undefined
      ? tail('error', id, `"message":${quote(answer.message)},"stack":${quote(answer.stack)}`, stdout, stderr)
      : tail('result', id, `"value":${answer.value},"repr":${quote(answer.repr)}`, stdout, stderr);
  const length = Buffer.byteLength(line);
  return length < LINE_LIMIT
    ? line
    : tooLarge(id, `the answer has ${length} bytes; at most ${LINE_LIMIT} are sent`, stdout, stderr);
}

async function evaluate(id, code) {
  current = id;
  const answer = await ask({ kind: 'eval', number: id, code });
  current = null;
  return resultLine(id, answer);
}

async function event(request) {
  const answer = await ask({ ...request, kind: request.type, number: request.id });
  if (answer.report === undefined) return resultLine(request.id, { ...answer, stdout: '', stderr: '' });
  const more = answer.inPlace ? `,"in_place":${JSON.stringify(answer.inPlace)}` : '';
  return `{"type":"done","id":${request.id},"report":${JSON.stringify(answer.report)}${more}}`;
}

async function handle(line) {
  let request;
  try {
    request = JSON.parse(line);
  } catch (error) {
    log(`a request was not understood: ${error.message}`);
    return;
  }
  switch (request.type) {
    case 'eval':
      return send(await evaluate(request.id, request.code));
    case 'quiesce':
    case 'identity':
    case 'continue':
      return send(await event(request));
    default:
      log(`a request of an unknown kind: ${request.type}`);
  }
}

async function main() {
  watchInterrupts();
  const warmed = await ask({ kind: 'eval', number: 'warm', code: warm });
  if (warmed.value === undefined) {
    log(`${warmed.stack || warmed.message || warmed.tooLarge}\nthe warm-up (OFFSHOOT_WARM) failed`);
    return tell({ kind: 'exit', code: 1 });
  }
  // The paths of a fork's first request, so that they are compiled in the template.
  for (const code of ['[1.5, null, "x", { a: 1 }]', 'console.log("x")', 'throw new Error("x")', '1 +', 'await 1']) {
    await evaluate('rehearsal', code);
  }
  send('{"type":"ready","continue":true}');
  readLines(handle);
}

void main();
