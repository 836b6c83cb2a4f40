// Uploads photos in headless Chromium (chromium.mjs) over a slow connection that breaks. It is given {mine, files, twice, large,
// refused, shots}, and asks the test for what only the test can break.
import { ask, browser, look } from './chromium.mjs'

const MEGABIT = 125_000 // bytes a second

/** A window with a connection of 1 Mbit/s. */
async function open(context, given, seen) {
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
const queued = (page, count) => page.waitForFunction((count) => document.querySelectorAll(
  '.image[data-stage=queued]').length === count, count)
const state = (page, name) => page.waitForFunction((name) => document.querySelector(`.file[data-state=${name}]`), name)
/** These photos are under way: no longer at the beginning, and not at the end. */
const underway = (page, files) => page.waitForFunction((names) => names.every((name) => [...document.querySelectorAll('.file')].some(
  (line) => line.querySelector('.name').textContent === name && line.dataset.state === 'sending'
    && line.querySelector('progress').value > 0.1 && line.querySelector('progress').value < 0.9)),
  files.map((file) => file.split('/').at(-1)))

/** Notes what is wrong with how a page looks. */
async function judge(page, name, given, seen) {
  const { sideways, violations } = await look(page)
  seen.looks.push(...violations.map((violation) => `${name}: ${violation}`), ...sideways ? [`${name}: sideways`] : [])
  if (given.shots) await page.screenshot({ path: `${given.shots}/${name}.png` })
}

export const scenarios = {
  async photos(given) {
    const context = await browser.newContext({ viewport: { width: 360, height: 800 }, colorScheme: 'dark', reducedMotion: 'reduce' })
    const seen = { problems: [], resumed: [], looks: [] }
    const large = given.large.map((number) => given.files[number])
    const [files, late] = [given.files.slice(0, -1), given.files.at(-1)]
    // The first window: chosen twice (a double click), broken three times, and closed in the middle of a photo.
    const first = await open(context, given, seen)
    await ask('lose', { reply: 'POST /storage/v1/upload/resumable' }) // the reply to the request that creates and ends the upload of a small photo
    await choose(first, files)
    await choose(first, given.files.slice(0, given.twice))
    await stored(first, 3)
    await first.connect(true) // 1: no network. Chromium lets requests end that it has sent, so their connections break, too.
    await ask('cut')
    await state(first, 'broken')
    await judge(first, 'upload-360-dark', given, seen)
    await first.connect(false)
    await underway(first, large.slice(0, 1))
    await ask('cut') // 2: every connection breaks
    await stored(first, 15)
    await ask('restart') // 3: Storage goes away and comes back
    await underway(first, large.slice(1))
    await first.close()
    await ask('lose_object') // of a large one: Storage has all bytes of it and failed at the end

    // Two windows go on with the same photos. The reply to the request that ends the upload of a large one is lost.
    const [second, third] = [await open(context, given, seen), await open(context, given, seen)]
    await second.setViewportSize({ width: 1440, height: 900 })
    await second.emulateMedia({ colorScheme: 'light' })
    await second.waitForSelector('#untagged:not([hidden])')
    seen.untagged = await second.textContent('#untagged-count')
    seen.closed = await ask('book')
    const before = seen.resumed.length
    await ask('lose', { reply: 'PATCH /storage/v1/upload/resumable' })
    const others = files.filter((file) => file !== large.at(-1))
    await Promise.all([choose(second, [...files, given.refused]), choose(third, others)])
    await stored(second, 10)
    await judge(second, 'upload-1440-light', given, seen)
    for (const page of [second, third]) {
      await page.waitForFunction(() => document.getElementById('stop').hidden).catch(async (error) => {
        const lines = await page.$$eval('.file', (all) => all.map((line) => `${line.dataset.state} ${line.innerText.replace(/\s+/g, ' ')}`))
        throw new Error(`${error.message}\n${page === second ? 'second' : 'third'} window:\n${[...lines, ...page.requests].join('\n')}`)
      })
    }
    seen.resumedAfterReload = seen.resumed.slice(before)
    seen.left = await second.$$eval('.file', (lines) => lines.map((line) => line.innerText.replace(/\s+/g, ' ').trim()))
    await queued(second, files.length)
    await judge(second, 'upload-1440-left', given, seen)

    // One more photo, and the connection breaks between its upload and the call that enqueues it.
    await second.route('**/rpc/enqueue_tagging', (route) => route.abort(), { times: 1 }) // the first call does not arrive,
    await ask('lose', { reply: 'POST /rest/v1/rpc/enqueue_tagging' }) // and nobody hears of the second one, which does
    await choose(second, [late])
    await queued(second, given.files.length)
    return seen
  },
}
