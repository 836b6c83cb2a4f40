// Uploads photos in headless Chromium over a slow connection that breaks. Arguments: JSON with {mine, files, twice, large, refused,
// shots, chromium}. It asks the test for what only the test can break, a line each, and goes on when a line comes back; the last line is
// what was seen, as JSON.
import { createRequire } from 'node:module'
import { createInterface } from 'node:readline'
import { chromium } from 'playwright-core'

const axe = createRequire(import.meta.url).resolve('axe-core/axe.min.js')
const given = JSON.parse(process.argv[2])
const MEGABIT = 125_000 // bytes a second
const replies = createInterface({ input: process.stdin })[Symbol.asyncIterator]()
const ask = async (what) => { console.log(what); return (await replies.next()).value }
const browser = await chromium.launch({ executablePath: given.chromium, args: ['--no-sandbox'] })
const context = await browser.newContext({ viewport: { width: 360, height: 800 }, colorScheme: 'dark', reducedMotion: 'reduce' })
const seen = { problems: [], resumed: [], looks: [], posts: 0 }

/** A window with a connection of 1 Mbit/s. */
async function open() {
  const page = await context.newPage()
  page.setDefaultTimeout(120_000)
  page.on('pageerror', (error) => seen.problems.push(String(error)))
  page.on('request', (request) => {
    if (request.method() === 'PATCH') seen.resumed.push(Number(request.headers()['upload-offset']))
  })
  page.requests = [] // the last ones
  const note = (request, outcome) => { page.requests = [...page.requests, `${request.method()} …${request.url().slice(-60)} ${outcome}`].slice(-20) }
  page.on('response', (response) => note(response.request(), response.status()))
  page.on('requestfailed', (request) => note(request, request.failure()?.errorText))
  await page.goto(given.mine)
  await page.waitForFunction(() => document.getElementById('connection').textContent === 'Live')
  const devtools = await context.newCDPSession(page)
  await devtools.send('Network.enable')
  page.connect = (offline) => devtools.send('Network.emulateNetworkConditions', {
    offline, latency: 20, downloadThroughput: MEGABIT, uploadThroughput: MEGABIT })
  await page.connect(false)
  return page
}

const choose = (page, files) => page.setInputFiles('#files', files)
const stored = (page, count) => page.waitForFunction((count) => document.querySelectorAll(
  '.file[data-state=stored]').length >= count, count)
const state = (page, name) => page.waitForFunction((name) => document.querySelector(`.file[data-state=${name}]`), name)
/** These photos are under way: no longer at the beginning, and not at the end. */
const underway = (page, numbers) => page.waitForFunction((names) => names.every((name) => [...document.querySelectorAll('.file')].some(
  (line) => line.querySelector('.name').textContent === name && line.dataset.state === 'sending'
    && line.querySelector('progress').value > 0.1 && line.querySelector('progress').value < 0.9)),
  numbers.map((number) => given.files[number].split('/').at(-1)))

async function look(page, name) {
  await page.addScriptTag({ path: axe })
  const { violations } = await page.evaluate(() => window.axe.run())
  const sideways = await page.evaluate(() => document.documentElement.scrollWidth > window.innerWidth)
  seen.looks.push(...violations.map((one) => `${name}: ${one.id}: ${one.nodes[0].html}`), ...sideways ? [`${name}: sideways`] : [])
  if (given.shots) await page.screenshot({ path: `${given.shots}/${name}.png` })
}

try {
  // The first window: chosen twice (a double click), broken three times, and closed in the middle of a photo.
  const first = await open()
  await ask('lose POST') // the reply to the request that creates and ends the upload of a small photo
  await choose(first, given.files)
  await choose(first, given.files.slice(0, given.twice))
  await stored(first, 3)
  await first.connect(true) // 1: no network. Chromium lets requests end that it has sent, so their connections break, too.
  await ask('cut')
  await state(first, 'broken')
  await look(first, 'upload-360-dark')
  await first.connect(false)
  await underway(first, given.large.slice(0, 1))
  await ask('cut') // 2: every connection breaks
  await stored(first, 15)
  await ask('restart') // 3: Storage goes away and comes back
  await underway(first, given.large.slice(1))
  await first.close()
  await ask('lose object') // of a large one: Storage has all bytes of it and failed at the end

  // Two windows go on with the same photos. The reply to the request that ends the upload of a large one is lost.
  const [second, third] = [await open(), await open()]
  await second.setViewportSize({ width: 1440, height: 900 })
  await second.emulateMedia({ colorScheme: 'light' })
  await second.waitForSelector('#untagged:not([hidden])')
  seen.untagged = await second.textContent('#untagged-count')
  seen.closed = JSON.parse(await ask('book'))
  const before = seen.resumed.length
  await ask('lose PATCH')
  const others = given.files.filter((_, number) => number !== given.large.at(-1))
  await Promise.all([choose(second, [...given.files, given.refused]), choose(third, others)])
  await stored(second, 10)
  await look(second, 'upload-1440-light')
  for (const page of [second, third]) {
    await page.waitForFunction(() => document.getElementById('stop').hidden).catch(async (error) => {
      const lines = await page.$$eval('.file', (all) => all.map((line) => `${line.dataset.state} ${line.innerText.replace(/\s+/g, ' ')}`))
      throw new Error(`${error.message}\n${page === second ? 'second' : 'third'} window:\n${[...lines, ...page.requests].join('\n')}`)
    })
  }
  seen.resumedAfterReload = seen.resumed.slice(before)
  seen.left = await second.$$eval('.file', (lines) => lines.map((line) => line.innerText.replace(/\s+/g, ' ').trim()))
  await second.waitForFunction((count) => document.querySelectorAll('.image[data-stage=queued]').length === count, given.files.length)
  await look(second, 'upload-1440-left')
  console.log(JSON.stringify(seen))
} finally {
  await browser.close()
}
