// Drives pages that use the package in headless Chromium (chromium.mjs). All scenarios are given {url, anonKey, pages, client, patience,
// lifetime, lapses, next}.
import { fileURLToPath } from 'node:url'
import { ask, browser } from './chromium.mjs'

const HOUR = 3600 // seconds
let given

/** A window of its own. What it fetches and what its websockets carry is noted. */
async function open(member, options = {}) {
  const context = await browser.newContext()
  const page = await context.newPage()
  Object.assign(page, { fetched: [], frames: [], joins: 0, tokens: 0, problems: [] })
  page.setDefaultTimeout(given.patience)
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
      if (event) page.frames.push({ event, at: Date.now(), lists: text.includes('"asset_ids"'), id: /"id": ?"([\w-]{36})"/.exec(text)?.[1] })
    })
  })
  await page.exposeFunction('mint', (who) => {
    page.tokens++
    return ask('mint', { member: who, lifetime: options.lifetime ?? HOUR })
  })
  if (options.clock) await page.clock.install()
  const { url, anonKey } = given
  const settings = { url, anonKey, workspace: member.workspace, member: member.user, client: given.client, ...options.page }
  page.address = `${given.pages}/#${encodeURIComponent(JSON.stringify(settings))}`
  await options.before?.(page, context, member)
  await page.goto(page.address)
  if (options.wait !== false) await live(page)
  return page
}

const live = (page) => page.waitForSelector('#one[data-status=live]', { state: 'attached' })
const count = (page, stage, number, place = '#one') => page.waitForFunction(
  ([place, stage, number]) => document.querySelectorAll(`${place} li[data-stage=${stage}]`).length === number, [place, stage, number])
const completed = (page, ids) => page.waitForFunction(
  (ids) => ids.every((id) => document.querySelector(`#one li[data-id="${id}"]`)?.dataset.stage === 'completed'), ids)
const upload = (page, paths) => page.evaluate((paths) => window.upload(paths), paths)
/** At 400 kbit/s. The times of the first change on the page and of those after it, by this process's clock, as those of messages are. */
async function slow(page) {
  const cdp = await page.context().newCDPSession(page)
  await cdp.send('Network.enable')
  await cdp.send('Network.emulateNetworkConditions', { offline: false, latency: 50, downloadThroughput: 50_000, uploadThroughput: 50_000 })
  const changes = []
  await page.exposeFunction('changed', () => { changes.push(Date.now()) })
  await page.evaluate(() => {
    new MutationObserver((list) => {
      if (list.some(({ target }) => target.dataset?.stage && !['none', 'queued'].includes(target.dataset.stage))) window.changed()
    }).observe(document.querySelector('#one ul'), { subtree: true, attributes: true, attributeFilter: ['data-stage'] })
  })
  return changes
}
/** A page that is open while its tokens lapse, and is live again `lives` times. At the end another window uploads. */
async function lapsing(options, lives) {
  const { member, paths } = await ask('workspace', { images: 3 })
  const page = await open(member, options)
  const opened = Date.now()
  await page.waitForTimeout(given.lapses * given.lifetime * 1000)
  await page.waitForFunction(
    (lives) => window.statuses.filter((status) => ['live', 'SUBSCRIBED'].includes(status)).length > lives, lives)
  await live(page)
  await ask('enqueue', { member, paths })
  await count(page, 'completed', 3)
  return { seconds: Math.round((Date.now() - opened) / 1000), joins: page.joins, tokens: page.tokens, problems: page.problems }
}
/** A page whose upload is at the provider, in a batch that lasts, while the next poll is far away. Five images are tagged at once. */
async function batch(images) {
  const { member, paths } = await ask('workspace', { images })
  await ask('provider', { batch_latency: [90, 90], hold: true })
  await ask('configure', { batch_poll_interval: '10 min', chunk_max_images: 10 })
  const page = await open(member)
  await upload(page, paths)
  await page.waitForFunction((rest) => document.querySelectorAll('#one li:is([data-stage=submitted], [data-stage=processing])').length === rest, images - 5)
  await count(page, 'completed', 5)
  return page
}

/** Cancels the upload that the page shows, and lets the provider do it once the page says so. */
async function cancelling(page, images) {
  await page.click('.job button')
  await page.waitForFunction(() => /cancel/.test(document.querySelector('.job span').textContent))
  const { batches } = await ask('provider', { batch_latency: [2, 3], cancelled: true })
  await count(page, 'failed', images - 5)
  return { batches, stages: await page.$$eval('#one li', (items) => items.map((item) => item.dataset.stage)), problems: page.problems }
}
/** A page, and what takes it off the line and back. */
async function line(member, options) {
  const sockets = [] // Chromium leaves those that are open alone
  let off = false
  const page = await open(member, { ...options, before: (page) => page.routeWebSocket(/realtime/, (socket) => {
    if (off) return socket.close({ code: 3001 })
    sockets.push(socket)
    socket.connectToServer()
  }) })
  const set = async (value) => {
    off = value
    await page.context().setOffline(off)
    if (off) await Promise.all(sockets.splice(0).map((socket) => socket.close({ code: 3001 })))
  }
  return { page, off: () => set(true), on: () => set(false) }
}
const texts = (page) => page.$$eval('#one li', (items) => items.map((item) => item.textContent))

const played = {
  /** 60 images by batch in a workspace of 2,000. */
  async large() {
    const { member, paths } = await ask('workspace', { images: 60, rows: 2000 })
    await ask('configure', { broadcast_interval: '1 s' })
    const page = await open(member, { clock: true })
    await ask('watch', { member })
    await page.waitForFunction(() => document.querySelectorAll('#one li').length >= 50)
    const changes = await slow(page)
    const inserted = page.waitForResponse((response) => response.url().includes('/rpc/enqueue_tagging'))
    const uploading = upload(page, paths)
    await inserted
    const ids = await uploading
    page.fetched.length = page.frames.length = 0
    await completed(page, ids)
    await page.waitForTimeout(500) // messages on their way
    const done = page.fetched.filter(({ path, method }) => path === '/rest/v1/assets' && method === 'GET')
    // The first message has all images, which the page shows as queued already: nothing can change at it. So the time runs from the first
    // message in whose transaction a row was beyond that, to the first such change on the page.
    const told = await ask('watched')
    const first = changes[0] - page.frames.find(({ id }) => told.includes(id)).at
    const until = page.fetched.length
    await page.clock.fastForward(60_000)
    await page.waitForTimeout(300)
    return {
      bytes: done.reduce((sum, { bytes }) => sum + bytes, 0), requests: done.length, messages: page.frames.length,
      first, lists: page.frames.some(({ lists }) => lists), idle: page.fetched.slice(until), problems: page.problems,
      order: await page.$$eval('#one li', (items, ids) => items.slice(0, 60).every((item) => ids.includes(item.dataset.id)), ids),
    }
  },

  /** Changes are seen while the upload runs: no message ends the fetch of the one before it. Each message comes before 3 s have passed. */
  async slow() {
    const { member, paths } = await ask('workspace', { images: 14, rows: 900 })
    await ask('configure', { chunk_delay: '2.5 s', broadcast_interval: '1 s' })
    const page = await open(member)
    const changes = await slow(page)
    await completed(page, await upload(page, paths))
    return { ahead: page.frames.findLast(({ event }) => event === 'job-complete')?.at - changes[0], problems: page.problems }
  },

  async two() {
    const { member, paths } = await ask('workspace', { images: 6 })
    const page = await open(member, { page: { two: true } })
    await upload(page, paths.slice(0, 3))
    await count(page, 'completed', 3)
    await count(page, 'completed', 3, '#two')
    await page.evaluate(() => window.show({ two: false }))
    await page.waitForFunction(() => !document.getElementById('two'))
    await page.waitForTimeout(1500) // the channel stays while one of them is there
    await upload(page, paths.slice(3))
    await count(page, 'completed', 6)
    return { joins: page.joins, problems: page.problems }
  },

  /** StrictMode, and a component that React hides and shows again: it has missed what changed meanwhile. */
  async strict() {
    const { member, paths } = await ask('workspace', { images: 5 })
    const page = await open(member, { page: { strict: true } })
    await upload(page, paths.slice(0, 3))
    await count(page, 'completed', 3)
    await page.evaluate(() => window.show({ hidden: true })) // another component keeps the channel
    await ask('enqueue', { member, paths: paths.slice(3), wait: true })
    await page.evaluate(() => window.show({ hidden: false }))
    await count(page, 'completed', 5)
    return { joins: page.joins, problems: page.problems }
  },

  /** Tokens lapse, one after the other: those of a token provider, which keeps each one until its end. */
  async lapse() {
    return await lapsing({ lifetime: given.lifetime }, given.lapses - 1)
  },

  /** Those of supabase.auth, which makes a new one every 30 s when they last 60: then they do not lapse at all. */
  async sessions() {
    return await lapsing({
      page: { sessions: true },
      before: async (page, context, member) => {
        await context.route('**/auth/v1/token**', async (route) => {
          page.tokens++
          await route.fulfill({ json: await session(member, given.lifetime) })
        })
        await page.addInitScript((signed) => { localStorage.session ??= signed }, JSON.stringify(await session(member, given.lifetime)))
      },
    }, 0)
  },

  /** One user signs out, and another one signs in, who is no member. Then the first one comes back. */
  async users() {
    const { member, paths } = await ask('workspace', { images: 6 })
    const { member: stranger } = await ask('workspace', {})
    const page = await open(member, {
      page: { sessions: true },
      before: async (page, context, member) => {
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
    const shown = await texts(page)
    const out = { frames: page.frames.length - heard, shown }
    await sign(page, stranger)
    await page.waitForFunction(() => window.statuses.some((status) => /refused|CHANNEL_ERROR/.test(status)))
    await ask('enqueue', { member, paths: paths.slice(4), wait: true })
    const other = { frames: page.frames.length - heard, shown: await texts(page) }
    await sign(page, member)
    await live(page)
    await count(page, 'completed', 6)
    await page.evaluate(() => window.show({ one: false })) // the page of a sign-in: only the cache has the rows now
    await page.waitForTimeout(1500) // the channel is gone
    await sign(page, stranger)
    await page.evaluate(() => {
      new MutationObserver((list) => {
        window.leaked = list.some(({ addedNodes }) => [...addedNodes].some((node) => node.matches?.('li, :has(li)'))) || window.leaked
      }).observe(document.body, { childList: true, subtree: true })
      window.show({ one: true })
    })
    await page.waitForFunction(() => window.statuses.filter((status) => /refused|CHANNEL_ERROR/.test(status)).length >= 2)
    other.leaked = await page.evaluate(() => window.leaked ?? false)
    return { out, other, statuses: await page.evaluate(() => window.statuses), problems: page.problems }
  },

  /** Offline for longer than the token lasts, while two uploads end, the page's own and another window's. Then the line flaps. */
  async offline() {
    const { member, paths } = await ask('workspace', { images: 11 })
    await ask('configure', { chunk_delay: '4 s' })
    const { page, off, on } = await line(member, { lifetime: given.lifetime })
    await upload(page, paths.slice(0, 8))
    await page.waitForFunction(() => document.querySelectorAll('#one li[data-stage=completed]').length >= 5)
    await off()
    await ask('enqueue', { member, paths: paths.slice(8), wait: true })
    await page.waitForTimeout(given.lifetime * 1000)
    for (let i = 0; i < 3; i++) {
      await on()
      await page.waitForTimeout(500)
      await off()
    }
    await on()
    await count(page, 'completed', 11)
    const known = given.client === 'old' ? 1 : 2 // the snippets show the page's own only
    await page.waitForFunction((known) => document.querySelectorAll('.job[data-over=true]').length === known, known)
    return { jobs: await page.locator('.job span').allTextContents(), statuses: await page.evaluate(() => window.statuses), problems: page.problems }
  },

  /** A batch is cancelled in the window that began it. The page says so at once, and the provider, which takes its time, knows at once. */
  async cancel() {
    return await cancelling(await batch(12), 12)
  },

  /** A page is loaded again in the middle of a batch, and finds the upload. */
  async reload() {
    const page = await batch(51) // more than the list's first 50
    await page.reload()
    await live(page)
    await page.waitForFunction(() => document.querySelectorAll('#one li').length >= 50)
    await page.evaluate(() => window.loadMore?.())
    return await cancelling(page, 51)
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
  'supabase-autotag/dist/': '../../clients/js/dist/',
}

/** Files of npm's CDN, from this repository. */
function fromHere(route) {
  const path = route.request().url().split('/npm/')[1].replace('@supabase/', '').replace(/^supabase-autotag@[\d.]+/, 'supabase-autotag')
  const [cdn, here] = Object.entries(CDN).find(([start]) => path.startsWith(start))
  return route.fulfill({ path: fileURLToPath(new URL(here + path.slice(cdn.length), import.meta.url)), contentType: 'text/javascript' })
}

/** An example: sign in, upload two images, edit a tag and filter by it, where it has that, and be refused by a quota. */
async function example(address, edits = true) {
  const { member, files } = await ask('workspace', { files: 4, quota: 3 })
  const context = await browser.newContext()
  const page = await context.newPage()
  page.setDefaultTimeout(given.patience)
  const problems = []
  page.on('pageerror', (error) => problems.push(String(error)))
  const signed = await session(member)
  await context.route('**/auth/v1/**', (route) => route.fulfill({ json: signed }))
  await context.route('https://cdn.jsdelivr.net/**', fromHere)
  await page.goto(address)
  await page.getByLabel('E-mail').fill('ann@example.org')
  await page.getByLabel('Password').fill('secret')
  await page.getByRole('button', { name: 'Sign in' }).click()
  await page.getByRole('status').filter({ hasText: 'Live' }).waitFor()
  const images = page.getByRole('list', { name: 'Images' }).locator('> li')
  const add = (some) => page.getByLabel('Add images').setInputFiles(some)
  await add(files.slice(0, 2))
  await images.nth(1).waitFor()
  await page.waitForFunction(() => document.querySelectorAll('li[data-stage=completed]').length === 2)
  const tags = edits && await editTags(page, images)
  await add(files.slice(2))
  await page.getByRole('alert').filter({ hasText: 'quota' }).waitFor()
  await page.waitForFunction(() => document.querySelectorAll('li[data-stage=none]').length === 2)
  if (!edits) { // rendered on the server: what it was is there before any script
    const rendered = await (await page.request.get(address)).text()
    problems.push(...await images.evaluateAll((all) => all.map((item) => item.textContent.trim()))
      .then((texts) => texts.filter((text) => !rendered.replaceAll('<!-- -->', '').includes(text))))
  }
  return { tags, refusal: (await page.getByRole('alert').allTextContents()).join(''), stages: await images.evaluateAll((all) => all.map((item) => item.dataset.stage)), problems }
}

async function editTags(page, images) {
  const tags = await images.first().getByRole('list', { name: 'Tags' }).locator('> li').count()
  await images.first().getByLabel('Add a tag').fill('aunt "mary"')
  await images.first().getByLabel('Add a tag').press('Enter')
  await images.first().getByText('aunt "mary"').waitFor()
  await page.getByLabel('Filter by tag').fill('aunt "mary"')
  await page.waitForFunction(() => document.querySelectorAll('li[data-stage]').length === 1)
  await page.getByLabel('Filter by tag').fill('')
  await page.waitForFunction(() => document.querySelectorAll('li[data-stage]').length === 2)
  return tags
}
played.plain = () => example(`${given.pages}/plain/`)
played.react = () => example(`${given.pages}/react/`)
played.next = () => example(given.next, false)

async function session(member, lifetime = HOUR) {
  const { token } = await ask('mint', { member: member.user, lifetime })
  return {
    access_token: token, refresh_token: 'r', token_type: 'bearer', expires_in: lifetime, expires_at: Math.floor(Date.now() / 1000) + lifetime,
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

/** The scenarios. Their arguments are kept in `given`, which their helpers read. */
export const scenarios = Object.fromEntries(Object.entries(played).map(([name, scenario]) => [name, (forThis) => {
  given = forThis
  return scenario()
}]))
