// Drives the browsers of several forks at once, as a user of Playwright would, and prints what each of them shows: one line of JSON for each.
//
//   node drive.mjs ENDPOINT_PORT ADDRESS…      ADDRESS: where `offshoot forward FORK 0:9222` listens
//
// All of them are at the same step at any time, so that each has set its cookie before any of them looks at what cookies there are.

import { chromium } from 'playwright-core';

const PATIENCE = 300_000; // ms; guests may be emulated, on a busy machine
const WARM = 'file:///usr/share/offshoot/page.html';

const [port, ...addresses] = process.argv.slice(2);
const endpoint = `http://127.0.0.1:${port}/internal/fork-identity/config`;

const all = (list, step) => Promise.all(list.map(step));

const browsers = await all(addresses, (address) => chromium.connectOverCDP(`http://${address}`, { timeout: PATIENCE }));

const seen = await all(browsers, async (browser) => {
  const [context] = browser.contexts();
  context.setDefaultTimeout(PATIENCE);
  context.setDefaultNavigationTimeout(PATIENCE);
  const page = context.pages().find((page) => page.url() === WARM);
  if (page === undefined) throw new Error(`the page is not there; there are ${context.pages().map((page) => page.url())}`);
  const [title, uuid] = await page.evaluate(() => [document.title, crypto.randomUUID()]);
  return { context, title, uuid };
});

// Cookies are set and the endpoint is asked by a page of the endpoint's: one that an earlier client has left there, or a new one.
const pages = await all(seen, async ({ context, uuid }) => {
  let page = context.pages().find((page) => page.url() === endpoint);
  if (page === undefined) {
    page = await context.newPage();
    await page.goto(endpoint);
  }
  await page.evaluate((value) => { document.cookie = `playwright=${value}`; }, uuid);
  return page;
});

const shown = await all(seen, async ({ context, title, uuid }, at) => {
  const identity = await pages[at].evaluate(async (url) => (await fetch(url)).json(), endpoint);
  const cookies = await context.cookies(endpoint);
  return { title, uuid, identity, cookies: Object.fromEntries(cookies.map(({ name, value }) => [name, value])) };
});

for (const one of shown) console.log(JSON.stringify(one));
// The connections only: the browsers are the forks'.
await all(browsers, (browser) => browser.close());
