// Drives the gallery in headless Chromium (chromium.mjs). A scenario is given {mine, other, stranger, files: [paths],
// shots: folder or null, tag} and tells what was seen.
import { browser, look } from './chromium.mjs'

const PATIENCE = 120_000 // milliseconds; only a broken promise takes so long

/** A window of its own; what it asked the edge for is counted. */
async function open(address, options = {}) {
  const context = await browser.newContext({ viewport: { width: 1440, height: 900 }, ...options })
  const page = await context.newPage()
  page.setDefaultTimeout(PATIENCE)
  page.asked = []
  page.problems = []
  page.on('request', (request) => page.asked.push(new URL(request.url()).pathname))
  page.on('pageerror', (error) => page.problems.push(String(error)))
  if (options.sockets) {
    await page.routeWebSocket(/realtime/, (socket) => {
      options.sockets.push(socket)
      socket.connectToServer()
    })
  }
  if (options.slow) {
    await page.route(options.slow.url, async (route) => {
      await options.slow.until
      await route.continue()
    })
  }
  await page.goto(address)
  await page.waitForFunction((refused) => refused ? document.getElementById('notice').textContent !== ''
    : document.getElementById('connection').textContent === 'Live' && !document.getElementById('asked').hidden, options.refused)
  return page
}

const stages = (page) => page.$$eval('.image', (items) => items.map((item) => item.dataset.stage))
const all = (page, stage, count) => page.waitForFunction(
  ([stage, count]) => document.querySelectorAll(`.image[data-stage=${stage}]`).length === count, [stage, count],
  { timeout: PATIENCE })
const add = (page, files) => page.setInputFiles('#files', files)
const shown = (page) => page.$$eval('.image', (items) => items.map((item) => ({
  id: item.dataset.asset, stage: item.dataset.stage, text: item.querySelector('.badge').textContent,
  tags: [...item.querySelectorAll('.tag')].map((tag) => tag.textContent), alt: item.querySelector('img').alt,
  by: [...item.querySelectorAll('.tags .by')].map((by) => by.textContent),
  picture: item.querySelector('img').naturalWidth > 0, error: item.querySelector('.error').textContent,
})))

/** Saves a screenshot of the page from its top, with all pictures in view loaded; `height` cuts it off. */
async function shot(page, shots, name, height) {
  if (!shots) return
  await page.evaluate(() => window.scrollTo(0, 0))
  await page.waitForFunction(() => [...document.querySelectorAll('.picture img')].every(
    (img) => img.getBoundingClientRect().top > window.innerHeight || img.naturalWidth > 0))
  const { width } = page.viewportSize()
  await page.screenshot({ path: `${shots}/${name}.png`, ...height && { clip: { x: 0, y: 0, width, height } } })
}

/** Saves a screenshot of the first image in this stage; false: its stage has changed meanwhile. */
async function shotOfStage(page, shots, stage) {
  if (!shots) return true
  const item = page.locator(`.image[data-stage=${stage}]`).first()
  const asset = await item.getAttribute('data-asset', { timeout: 1000 }).catch(() => null)
  if (!asset) return false
  const card = page.locator(`[data-asset="${asset}"]`)
  await page.waitForFunction((id) => document.querySelector(`[data-asset="${id}"] img`).naturalWidth > 0, asset)
  await card.evaluate((item) => { item.style.alignSelf = 'start' }) // without the space below a short card
  await card.screenshot({ path: `${shots}/stage-${stage}.png` })
  await card.evaluate((item) => { item.style.alignSelf = '' })
  return await card.getAttribute('data-stage') === stage
}

export const scenarios = {
  /** A few images; a second window follows, a stranger's sees nothing, and nobody asks by the clock. */
  async few(given) {
    const [one, two, other] = [await open(given.mine), await open(given.mine), await open(given.other)]
    await add(one, given.files)
    await all(two, 'completed', given.files.length)
    await all(one, 'completed', given.files.length)
    await one.waitForTimeout(1000)
    const before = two.asked.length
    await two.waitForTimeout(3000)
    await one.click('#usage summary')
    await one.click('#asked summary')
    await one.waitForFunction(() => document.getElementById('asked-who').textContent !== '')
    const writable = await one.$$eval('#asked input, #asked textarea, #asked select, #asked button', (fields) => fields.filter(
      (field) => field.checkVisibility() && !field.readOnly && !field.disabled).map((field) => field.id))
    return {
      writable, one: await shown(one), two: await shown(two), other: await shown(other), askedWhileIdle: two.asked.length - before,
      usage: await one.$$eval('#usage tbody tr', (rows) => rows.map((row) => row.innerText)),
      problems: [...one.problems, ...two.problems, ...other.problems],
    }
  },

  /** Two windows edit an image's tags and tag it again; then only the vocabulary may be used. A stranger has their address. */
  async edited(given) {
    const [one, two] = [await open(given.mine), await open(given.mine)]
    const stranger = await open(given.stranger, { refused: true })
    await add(one, given.files)
    await all(one, 'completed', given.files.length)
    await all(two, 'completed', given.files.length)
    const before = await shown(one)
    const { id, tags: [gone, , wanted] } = before[0]
    const card = `[data-asset="${id}"]`
    const type = async (page, tag) => {
      await page.fill(`${card} .add input`, tag)
      await page.press(`${card} .add input`, 'Enter')
      await page.waitForFunction(([card, tag]) => [...document.querySelectorAll(`${card} .tag`)].some(
        ({ textContent }) => textContent === tag), [card, tag])
    }
    const again = async (jobs) => {
      await two.click(`${card} .retry`)
      for (const page of [one, two]) {
        await page.waitForFunction(([card, jobs]) => document.querySelectorAll('.job').length === jobs
          && [...document.querySelectorAll('.job .cancel')].every((button) => button.hidden)
          && document.querySelector(card).dataset.stage === 'completed', [card, jobs])
        await page.evaluate(async () => (await import('./gallery.js')).refresh()) // the broadcast's own may still run
      }
      const rows = async (page) => (await shown(page)).find((item) => item.id === id)
      return [await rows(one), await rows(two)]
    }
    await type(one, given.tag)
    await one.click(`${card} .remove >> nth=0`)
    await one.waitForFunction((card) => document.activeElement === document.querySelector(`${card} .add input`), card)
    await type(two, 'wedding') // this window has not seen what the other one has done
    const rerun = await again(2)
    if (given.shots) await one.locator(card).screenshot({ path: `${given.shots}/tags.png` })
    await one.click('#asked summary')
    await one.fill('#word', wanted.toUpperCase())
    await one.press('#word', 'Enter')
    await one.waitForFunction(() => document.querySelectorAll('#words li').length === 1)
    await one.selectOption('#mode', 'only')
    await one.click('#save')
    await one.waitForFunction(() => document.getElementById('asked-said').textContent.startsWith('Saved'))
    const only = await again(3)
    const refusals = await stranger.evaluate(async (id) => {
      const { supabase, workspace } = await import('./client.js')
      const call = async (name, more = {}) => {
        const { error } = await supabase.rpc(name, { workspace_id: workspace, ...more })
        return JSON.parse(error?.details ?? '{}').code
      }
      const { data } = await supabase.from('assets').update({ tags: [] }).eq('id', id).select('id')
      return {
        written: data, tagging_vocabulary: await call('tagging_vocabulary'), tagging_profile: await call('tagging_profile'),
        edit: await call('edit_tagging_vocabulary', { removed: ['a'] }), set: await call('set_tagging_profile', { profile: {} }),
      }
    }, id)
    return {
      id, gone, wanted, rerun, only, refusals,
      stranger: { images: await shown(stranger), text: await stranger.innerText('main'), asked: await stranger.isVisible('#asked') },
      words: await one.$$eval('#words .tag', (tags) => tags.map((tag) => tag.textContent)), mode: await one.inputValue('#mode'),
      problems: [...one.problems, ...two.problems, ...stranger.problems],
    }
  },

  /** Many images: each stage is seen on the way, and photographed. */
  async many(given) {
    const page = await open(given.mine)
    const seen = {}
    const note = async () => {
      for (const item of await shown(page)) {
        if (seen[item.stage]) continue
        if (item.stage !== 'queued' && !await shotOfStage(page, given.shots, item.stage)) break
        seen[item.stage] = item.text
        if (given.shots && item.stage === 'processing') {
          await page.waitForFunction(() => document.querySelector('.job progress').value >= 25)
          await shot(page, given.shots, 'gallery')
        }
      }
    }
    let over = false
    const watching = (async () => {
      while (!over) {
        await note()
        await new Promise((resolve) => setTimeout(resolve, 100)) // each stage lasts for a second or more
      }
      await note() // the last stage, which ended the watch
    })()
    await add(page, given.files)
    await all(page, 'completed', given.files.length)
    over = true
    await watching
    const assets = page.asked.filter((path) => path === '/rest/v1/assets').length
    return { seen, problems: page.problems, assets, images: (await shown(page)).length }
  },

  /** Images that are stored and not tagged yet: what the page asked the edge for from their upload to the last tag. */
  async patient(given) {
    const page = await open(given.mine)
    const count = (await stages(page)).length
    await page.click('#tag-all')
    await page.waitForFunction(() => document.querySelectorAll('.job').length === 1, null, { timeout: PATIENCE })
    const mark = page.asked.length
    await all(page, 'completed', count)
    const asked = {}
    for (const path of page.asked.slice(mark)) {
      if (!path.startsWith('/storage/v1/object/sign')) asked[path] = (asked[path] ?? 0) + 1
    }
    return { count, asked, problems: page.problems }
  },

  /** The websocket breaks while images are tagged: the page says so, comes back, and shows what it missed. */
  async lost(given) {
    const sockets = []
    const page = await open(given.mine, { sockets })
    const other = await open(given.mine)
    await sockets.at(-1).close({ code: 3001, reason: 'test' })
    await add(other, given.files)
    await all(page, 'completed', given.files.length)
    return { sockets: sockets.length, connection: await page.textContent('#connection'), problems: page.problems }
  },

  /** Files are chosen while the page still fetches what it shows. */
  async early(given) {
    let answer
    const answered = new Promise((resolve) => { answer = resolve })
    const page = await open(given.mine, { slow: { url: '**/rpc/tagging_usage', until: answered } })
    await add(page, given.files)
    await all(page, 'completed', given.files.length)
    answer()
    return { problems: page.problems }
  },

  /** One image fails, says why, and is tried again. */
  async failed(given) {
    const page = await open(given.mine)
    await add(page, given.files)
    await all(page, 'failed', 1)
    await shotOfStage(page, given.shots, 'failed')
    const before = await shown(page)
    await page.focus('.image[data-stage=failed] .retry')
    await page.keyboard.press('Enter')
    await all(page, 'completed', given.files.length)
    return { before, after: await shown(page), problems: page.problems }
  },

  async cancelled(given) {
    const page = await open(given.mine)
    await add(page, given.files)
    await page.waitForFunction(() => document.querySelectorAll('.image[data-stage=completed]').length > 0)
    await page.click('.job .cancel')
    await page.waitForFunction((count) => [...document.querySelectorAll('.image')].every(
      (item) => ['completed', 'failed'].includes(item.dataset.stage)), given.files.length)
    return { stages: await stages(page), job: await page.textContent('.job'), problems: page.problems }
  },

  async refused(given) {
    const page = await open(given.mine)
    await add(page, given.files)
    await page.waitForFunction(() => document.getElementById('notice').textContent !== '')
    await shot(page, given.shots, 'quota', 480)
    return { notice: await page.textContent('#notice'), problems: page.problems }
  },

  /** Narrow and wide, light and dark, with every kind of image: nothing for axe-core, nothing to scroll sideways. */
  async looks(given) {
    const results = []
    const page = await open(given.mine, { viewport: { width: 360, height: 900 }, reducedMotion: 'reduce' })
    for (const width of [360, 1440]) {
      await page.setViewportSize({ width, height: 900 })
      for (const colorScheme of ['light', 'dark']) {
        await page.emulateMedia({ colorScheme })
        await page.click('#usage summary')
        await page.click('#asked summary')
        await page.waitForFunction(() => document.querySelectorAll('#words li').length > 0)
        results.push({ width, colorScheme, paper: await page.evaluate(() => getComputedStyle(document.body).backgroundColor), ...await look(page) })
        if (colorScheme === 'light') await shot(page, given.shots, `asked-${width}`)
        await page.click('#usage summary')
        await page.click('#asked summary')
        if (width === 1440 && colorScheme === 'light') await shotOfStage(page, given.shots, 'queued')
        await shot(page, given.shots, `page-${width}-${colorScheme}`)
      }
    }
    return { results, problems: page.problems }
  },

  /** The page of a comparison, in a file: nothing for axe-core, nothing to scroll sideways. */
  async comparison(given) {
    const results = []
    const context = await browser.newContext({ viewport: { width: 1180, height: 1180 }, bypassCSP: true })
    const page = await context.newPage()
    await page.goto(`file://${given.files[0]}`)
    for (const width of [1180, 360]) {
      await page.setViewportSize({ width, height: 1180 })
      results.push({ width, ...await look(page) })
      if (given.shots && width === 1180) await page.screenshot({ path: `${given.shots}/compare.png` })
    }
    return { results }
  },
}
