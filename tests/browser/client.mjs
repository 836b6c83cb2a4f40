// Drives pages that use the package in headless Chromium, one browser for all scenarios. It prints JSON lines: {do, …} asks the
// test to do something, which answers with a line; {scenario, seen | error} is what a scenario saw.
// Arguments: JSON with {chromium, pages, client, scenarios}.
import { createInterface } from 'node:readline'
import { fileURLToPath } from 'node:url'
import { chromium } from 'playwright-core'

const given = JSON.parse(process.argv[2])
const PATIENCE = given.patience ?? 60_000 // milliseconds; only a broken promise takes so long
const answers = createInterface({ input: process.stdin })[Symbol.asyncIterator]()
const say = (line) => console.log(JSON.stringify(line))
let asking = Promise.resolve()

/** Asks the test to do something. */
function ask(what, args = {}) {
  asking = asking.then(async () => {
    say({ do: what, ...args })
    return JSON.parse((await answers.next()).value)
  })
  return asking
}

const browser = await chromium.launch({ executablePath: given.chromium, args: ['--no-sandbox'] })

/** A window of its own. What it fetches and what its websockets carry is noted. */
async function open(member, options = {}) {
  const context = await browser.newContext()
  const page = await context.newPage()
  Object.assign(page, { fetched: [], frames: [], joins: 0, problems: [] })
  page.setDefaultTimeout(PATIENCE)
  page.on('pageerror', (error) => page.problems.push(String(error)))
  page.on('response', async (response) => {
    const request = response.request()
    if (request.method() === 'OPTIONS' || !request.url().includes('/rest/v1/')) return
    const note = { path: new URL(request.url()).pathname, method: request.method(), at: Date.now(), bytes: 0 }
    page.fetched.push(note)
    note.bytes = (await response.body().catch(() => '')).length
  })
  page.on('websocket', (socket) => {
    socket.on('framesent', ({ payload }) => { if (String(payload).includes('phx_join')) page.joins++ })
    socket.on('framereceived', ({ payload }) => {
      const text = payload.toString('latin1')
      const event = /job-progress|job-complete|batch-complete/.exec(text)?.[0]
      if (event) page.frames.push({ event, at: Date.now(), lists: text.includes('"asset_ids"') })
    })
  })
  await page.exposeFunction('mint', (who) => ask('mint', { member: who, lifetime: options.lifetime ?? 3600 }))
  if (options.clock) await page.clock.install()
  const { url, anonKey } = given
  const settings = { url, anonKey, workspace: member.workspace, member: member.user, client: given.client, ...options.page }
  page.address = `${given.pages}/#${encodeURIComponent(JSON.stringify(settings))}`
  await options.before?.(page, context)
  await page.goto(page.address)
  if (options.wait !== false) await live(page)
  return page
}

const live = (page) => page.waitForSelector('#one[data-status=live]', { state: 'attached' })
const count = (page, stage, number, place = '#one') => page.waitForFunction(
  ([place, stage, number]) => document.querySelectorAll(`${place} li[data-stage=${stage}]`).length === number, [place, stage, number])
const upload = (page, paths) => page.evaluate((paths) => window.upload(paths), paths)
const texts = (page) => page.$$eval('#one li', (items) => items.map((item) => item.textContent))

const scenarios = {
  /** 60 images by batch in a workspace of 2,000, at 400 kbit/s. */
  async large() {
    const { member, paths } = await ask('workspace', { images: 60, rows: 2000 })
    await ask('configure', { broadcast_interval: '1 s' })
    const page = await open(member, { clock: true })
    await page.waitForFunction(() => document.querySelectorAll('#one li').length >= 50)
    const cdp = await page.context().newCDPSession(page)
    await cdp.send('Network.enable')
    await cdp.send('Network.emulateNetworkConditions', { offline: false, latency: 50, downloadThroughput: 50_000, uploadThroughput: 50_000 })
    await page.evaluate(() => {
      window.changes = []
      new MutationObserver((list) => {
        if (list.some(({ target }) => target.dataset?.stage && !['none', 'queued'].includes(target.dataset.stage))) window.changes.push(Date.now())
      }).observe(document.querySelector('#one ul'), { subtree: true, attributes: true, attributeFilter: ['data-stage'] })
    })
    const inserted = page.waitForResponse((response) => response.url().includes('/rpc/enqueue_tagging'))
    const uploading = upload(page, paths)
    await inserted
    await uploading
    page.fetched.length = page.frames.length = 0
    await page.waitForFunction(() => [...document.querySelectorAll('#one li')].slice(0, 60).every((item) => item.dataset.stage === 'completed'))
    await page.waitForTimeout(500) // messages on their way
    const done = page.fetched.filter(({ path, method }) => path === '/rest/v1/assets' && method === 'GET')
    const changes = await page.evaluate(() => window.changes)
    const until = page.fetched.length
    await page.clock.fastForward(60_000)
    await page.waitForTimeout(300)
    await ask('configure', { broadcast_interval: '0' })
    return {
      bytes: done.reduce((sum, { bytes }) => sum + bytes, 0), requests: done.length, messages: page.frames.length,
      first: changes[0] - page.frames[0].at, lists: page.frames.some(({ lists }) => lists), idle: page.fetched.slice(until), problems: page.problems,
      order: await page.$$eval('#one li', (items) => items.slice(0, 60).every((item) => item.dataset.stage === 'completed')),
    }
  },

  async two() {
    const { member, paths } = await ask('workspace', { images: 6 })
    const page = await open(member, { page: { two: true } })
    await upload(page, paths.slice(0, 3))
    await count(page, 'completed', 3)
    await count(page, 'completed', 3, '#two')
    await page.evaluate(() => window.hideTwo())
    await page.waitForFunction(() => !document.getElementById('two'))
    await page.waitForTimeout(1500) // the channel stays while one of them is there
    await upload(page, paths.slice(3))
    await count(page, 'completed', 6)
    return { joins: page.joins, problems: page.problems }
  },

  async strict() {
    const { member, paths } = await ask('workspace', { images: 3 })
    const page = await open(member, { page: { strict: true } })
    await upload(page, paths)
    await count(page, 'completed', 3)
    return { joins: page.joins, problems: page.problems }
  },

  /** Tokens that last three seconds, three times over. */
  async lapse() {
    const { member, paths } = await ask('workspace', { images: 6 })
    const page = await open(member, { lifetime: 3 })
    await page.waitForFunction(() => window.statuses.filter((status) => ['live', 'SUBSCRIBED'].includes(status)).length >= 3)
    await live(page)
    await ask('enqueue', { member, paths: paths.slice(0, 3) }) // by another window
    await count(page, 'completed', 3)
    return { joins: page.joins, problems: page.problems }
  },

  /** One user signs out, and another one signs in, who is no member. Then the first one comes back. */
  async users() {
    const { member, paths } = await ask('workspace', { images: 6 })
    const { member: stranger } = await ask('workspace', {})
    const page = await open(member, {
      page: { sessions: true },
      before: async (page, context) => {
        await context.route('**/auth/v1/**', (route) => route.fulfill({ status: 204, body: '' }))
        await page.addInitScript((session) => { localStorage.session ??= session }, JSON.stringify(await session(member)))
      },
    })
    await ask('enqueue', { member, paths: paths.slice(0, 2) })
    await count(page, 'completed', 2)
    await page.evaluate(() => window.supabase.auth.signOut())
    await page.waitForFunction(() => !localStorage.session)
    const heard = page.frames.length
    await ask('enqueue', { member, paths: paths.slice(2, 4), wait: true })
    const out = { frames: page.frames.length - heard, shown: await texts(page), status: await page.getAttribute('#one', 'data-status') }
    await sign(page, stranger)
    await page.waitForSelector('#one[data-status=refused]', { state: 'attached' })
    await ask('enqueue', { member, paths: paths.slice(4), wait: true })
    const other = { frames: page.frames.length - heard, shown: await texts(page) }
    await sign(page, member)
    await live(page)
    await count(page, 'completed', 6)
    return { out, other, statuses: await page.evaluate(() => window.statuses), problems: page.problems }
  },

  async offline() {
    const { member, paths } = await ask('workspace', { images: 3 })
    const sockets = [] // Chromium leaves those that are open alone
    let off = false
    const page = await open(member, { before: (page) => page.routeWebSocket(/realtime/, (socket) => {
      if (off) return socket.close({ code: 3001 })
      sockets.push(socket)
      socket.connectToServer()
    }) })
    off = true
    await page.context().setOffline(true)
    await Promise.all(sockets.map((socket) => socket.close({ code: 3001 })))
    await ask('enqueue', { member, paths, wait: true })
    off = false
    await page.context().setOffline(false)
    await count(page, 'completed', 3)
    return { problems: page.problems }
  },

  /** A page is loaded again in the middle of an upload, finds it, and cancels it. */
  async reload() {
    const { member, paths } = await ask('workspace', { images: 12 })
    await ask('configure', { chunk_delay: '30 s' })
    const page = await open(member)
    await upload(page, paths)
    await count(page, 'completed', 5)
    await page.reload()
    await live(page)
    await page.click('.job button')
    await count(page, 'failed', 7)
    await ask('configure', { chunk_delay: '0.1 s' })
    return { stages: await page.$$eval('#one li', (items) => items.map((item) => item.dataset.stage)), texts: await texts(page), problems: page.problems }
  },

  async quota() {
    const { member, paths } = await ask('workspace', { images: 5, quota: 3 })
    const page = await open(member)
    await upload(page, paths)
    await page.waitForFunction(() => document.querySelector('.refusal').textContent)
    await page.waitForFunction(() => document.querySelectorAll('#one li').length === 5)
    return { refusal: await page.textContent('.refusal'), texts: await texts(page), problems: page.problems }
  },

  /** Somebody who is no member: one refusal, and no second try in five minutes. */
  async stranger() {
    const { member } = await ask('workspace', { images: 1 })
    const { member: other } = await ask('workspace', {})
    const page = await open({ ...other, workspace: member.workspace }, { wait: false, clock: true })
    await page.waitForFunction(() => window.statuses.some((status) => /refused|CHANNEL_ERROR/.test(status)))
    for (let minute = 0; minute < 5; minute++) {
      await page.clock.fastForward(60_000)
      await page.waitForTimeout(100)
    }
    return { joins: page.joins, statuses: await page.evaluate(() => window.statuses), problems: page.problems }
  },
}

// -- the examples

const CDN = {
  'supabase-js@2/dist/umd/supabase.js': '../../node_modules/@supabase/supabase-js/dist/umd/supabase.js',
  'supabase-autotag@0.1/dist/': '../../clients/js/dist/',
}

/** Files of npm's CDN, from this repository. */
function fromHere(route) {
  const path = route.request().url().split('/npm/')[1].replace('@supabase/', '')
  const [cdn, here] = Object.entries(CDN).find(([start]) => path.startsWith(start))
  return route.fulfill({ path: fileURLToPath(new URL(here + path.slice(cdn.length), import.meta.url)), contentType: 'text/javascript' })
}

/** An example: sign in, upload two images, edit a tag, filter by it, and be refused by a quota. */
async function example(name) {
  const { member, files } = await ask('workspace', { files: 4, quota: 3 })
  const context = await browser.newContext()
  const page = await context.newPage()
  page.setDefaultTimeout(PATIENCE)
  const problems = []
  page.on('pageerror', (error) => problems.push(String(error)))
  const signed = await session(member)
  await context.route('**/auth/v1/**', (route) => route.fulfill({ json: signed }))
  await context.route('https://cdn.jsdelivr.net/**', fromHere)
  await page.goto(`${given.pages}/${name}/`)
  await page.getByLabel('E-mail').fill('ann@example.org')
  await page.getByLabel('Password').fill('secret')
  await page.getByRole('button', { name: 'Sign in' }).click()
  await page.getByRole('status').filter({ hasText: 'Live' }).waitFor()
  const images = page.getByRole('list', { name: 'Images' }).locator('> li')
  const add = (some) => page.getByLabel('Add images').setInputFiles(some)
  await add(files.slice(0, 2))
  await images.nth(1).waitFor()
  await page.waitForFunction(() => document.querySelectorAll('li[data-stage=completed]').length === 2)
  const tags = await images.first().getByRole('list', { name: 'Tags' }).locator('> li').count()
  await images.first().getByLabel('Add a tag').fill('aunt "mary"')
  await images.first().getByLabel('Add a tag').press('Enter')
  await images.first().getByText('aunt "mary"').waitFor()
  await page.getByLabel('Filter by tag').fill('aunt "mary"')
  await page.waitForFunction(() => document.querySelectorAll('li[data-stage]').length === 1)
  await page.getByLabel('Filter by tag').fill('')
  await page.waitForFunction(() => document.querySelectorAll('li[data-stage]').length === 2)
  await add(files.slice(2))
  await page.getByRole('alert').filter({ hasText: 'quota' }).waitFor()
  await page.waitForFunction(() => document.querySelectorAll('li[data-stage=none]').length === 2)
  return { tags, refusal: (await page.getByRole('alert').allTextContents()).join(''), stages: await images.evaluateAll((all) => all.map((item) => item.dataset.stage)), problems }
}
scenarios.plain = () => example('plain')
scenarios.react = () => example('react')

async function session(member) {
  const { token } = await ask('mint', { member: member.user, lifetime: 3600 })
  return {
    access_token: token, refresh_token: 'r', token_type: 'bearer', expires_in: 3600, expires_at: Math.floor(Date.now() / 1000) + 3600,
    user: { id: member.user, aud: 'authenticated', app_metadata: {}, user_metadata: {}, created_at: '2026-01-01T00:00:00Z' },
  }
}

/** Signs in as auth-js does after a password: it stores the session, and says so to all who listen. */
async function sign(page, member) {
  const signed = await session(member)
  await page.context().unroute('**/auth/v1/**')
  await page.context().route('**/auth/v1/**', (route) => route.fulfill({ json: route.request().url().includes('/user') ? signed.user : signed }))
  await page.evaluate(({ access_token, refresh_token }) => window.supabase.auth.setSession({ access_token, refresh_token }), signed)
}

Object.assign(given, await ask('project'))
for (const name of given.scenarios) {
  try {
    say({ scenario: name, seen: await scenarios[name]() })
  } catch (error) {
    say({ scenario: name, error: String(error.stack).slice(0, 2000) })
  }
  await Promise.all(browser.contexts().map((context) => context.close()))
}
await browser.close()
process.exit()
