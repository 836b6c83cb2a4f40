// One headless Chromium for the tests of a process: node chromium.mjs PATH. It reads a line of JSON for each scenario to play,
// {script, scenario, given}, and answers with a line {seen} or {error, pages}. Before that, lines {do, …} ask the test to do something;
// the test answers each of them with a line.
import { createRequire } from 'node:module'
import { createInterface } from 'node:readline'
import { chromium } from 'playwright-core'

const input = createInterface({ input: process.stdin })
input.on('close', () => process.exit()) // the tests are over, or were killed; Chromium ends with this process
const lines = input[Symbol.asyncIterator]()
const say = (line) => console.log(JSON.stringify(line))
const axe = createRequire(import.meta.url).resolve('axe-core/axe.min.js')
export let browser
let asking

/** Asks the test to do something. */
export function ask(what, args = {}) {
  asking = asking.then(async () => {
    say({ do: what, ...args })
    return JSON.parse((await lines.next()).value)
  })
  return asking
}

/** How a page looks as it is now: the violations that axe-core finds, and whether there is something to scroll sideways. */
export async function look(page) {
  const sideways = await page.evaluate(() => document.documentElement.scrollWidth > window.innerWidth)
  if (!await page.evaluate(() => Boolean(window.axe))) await page.addScriptTag({ path: axe })
  const found = await page.evaluate(() => window.axe.run({ resultTypes: ['violations'], selectors: false }))
  return { sideways, violations: found.violations.map((violation) => `${violation.id}: ${violation.nodes[0].html}`) }
}

/** What a scenario saw. The next one finds no window of it, and another Chromium if this one has ended. */
async function play({ script, scenario, given }) {
  if (!browser?.isConnected()) browser = await chromium.launch({ executablePath: process.argv[2], args: ['--no-sandbox'] })
  asking = Promise.resolve()
  try {
    const { scenarios } = await import(script)
    return { seen: await scenarios[scenario](given) }
  } catch (error) {
    return { error: error.stack.slice(0, 4000), pages: await Promise.all(browser.contexts().flatMap((context) => context.pages()).map(describe)) }
  } finally {
    await Promise.all(browser.contexts().map((context) => context.close().catch(() => {})))
    await asking.catch(() => {})
  }
}

/** What a page shows when its scenario fails. */
const describe = async (page) => ({
  problems: page.problems, joins: page.joins,
  ...await page.evaluate(() => ({ statuses: window.statuses, text: document.body.innerText.slice(0, 500) })).catch(() => ({ text: 'It does not answer.' })),
})

async function playAll() {
  for (;;) say(await play(JSON.parse((await lines.next()).value)))
}

playAll() // not awaited here, because the scripts import this module, and would wait for its end
