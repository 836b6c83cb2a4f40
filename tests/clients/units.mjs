// Units of the npm package, with node:test: what to show, the channel with a client that misbehaves as Realtime does, and lists of rows
// against a table in memory. Run by test_package.py.
import assert from 'node:assert/strict'
import { readFileSync } from 'node:fs'
import { describe, mock, test } from 'node:test'
import { QueryClient, QueryClientProvider, QueryObserver } from '@tanstack/react-query'
import { createElement } from 'react'
import { renderToString } from 'react-dom/server'
import { AutotagError, createAutotag, describeStage, ENGLISH, oneAtATime } from '../../clients/js/dist/index.js'
import { Live, userOf } from '../../clients/js/dist/live.js'
import { AutotagProvider, useAssets, useJob, useTagging } from '../../clients/js/dist/react/index.js'
import { addressOf, AssetList, leanSelect, WRITTEN } from '../../clients/js/dist/react/assets.js'
import { JobList, OneJob } from '../../clients/js/dist/react/jobs.js'

const token = (claims) => `x.${Buffer.from(JSON.stringify(claims)).toString('base64url')}.x`

describe('what to show', () => {
  const now = Date.parse('2026-11-29T12:00:00Z')
  const at = (seconds) => new Date(now + seconds * 1000).toISOString()
  const text = (stage, eta, options) => describeStage({ tagging_stage: stage, tagging_progress: 40, tagging_eta: eta }, { now, ...options }).text

  test('the words are those of docs/frontend.md', () => {
    const page = readFileSync(new URL('../../docs/frontend.md', import.meta.url), 'utf8')
    const rows = [...page.matchAll(/^\| (?:`((?!tagging_)\w+)`|null) \| ([^|:]+?)(?::[^|]*)? \|/gm)]
    assert.equal(rows.length, 8)
    for (const [, stage, words] of rows) assert.equal(text(stage ?? null, at(0.5)).replace(/~\d+ min/, '~X min'), words)
  })

  test('a time that has passed is never negative', () => {
    assert.equal(text('processing', at(-960)), 'AI analyzing (any moment now)')
    assert.equal(text('processing', at(0)), 'AI analyzing (any moment now)')
    assert.equal(text('processing', at(170)), 'AI analyzing (~3 min)')
    assert.equal(text('processing', at(7200)), 'AI analyzing (~2 h)')
    assert.equal(text('processing', null), 'AI analyzing')
  })

  test('progress is a part of one, and there only while there is something to wait for', () => {
    const progress = (stage, percent = 40) => describeStage({ tagging_stage: stage, tagging_progress: percent }).progress
    assert.deepEqual(['queued', 'submitted', 'completing', 'completed', 'failed', null].map((stage) => progress(stage)), [0.4, 0.4, 0.9, 1, null, null])
    assert.deepEqual([progress('processing', null), progress('processing', 250), progress('processing', -1)], [0, 1, 0])
    assert.equal(describeStage({}).live, false)
  })

  test('every text can be translated, and a stage of a later version has one', () => {
    const german = Object.fromEntries(Object.entries(ENGLISH).map(([name, said]) => [name, typeof said === 'string' ? `de ${name}` : (value) => `de ${name} ${value}`]))
    for (const stage of ['queued', 'preparing', 'submitted', 'completing', 'completed', 'failed']) assert.equal(text(stage, null, { texts: german }), `de ${stage}`)
    assert.equal(text(null, null, { texts: german }), 'de none')
    assert.equal(text('processing', at(90), { texts: german }), 'de processing de minutes 2')
    assert.equal(text('processing', at(-90), { texts: { soon: 'gleich' } }), 'AI analyzing (gleich)')
    assert.equal(text('polishing', null), ENGLISH.other)
  })
})

/** A client of supabase-js, whose channel does what the test says. */
class Client {
  channels = []
  order = []
  user = 'ann'
  constructor({ sessions = false } = {}) {
    const self = this
    this.realtime = {
      accessTokenValue: null,
      accessToken: async () => self.user && token({ sub: self.user }),
      async setAuth() { self.order.push('setAuth'); this.accessTokenValue = await this.accessToken() },
    }
    this.auth = sessions
      ? { onAuthStateChange: (callback) => { self.signed = callback; return { data: { subscription: { unsubscribe() {} } } } } }
      : new Proxy({}, { get() { throw new Error('supabase.auth is not possible') } })
  }

  channel(topic) {
    const made = {
      topic, state: this.taken ? 'joined' : 'closed',
      on(type, filter, callback) { made.hear = (event, payload) => callback({ type, event, payload }); return made },
      subscribe(callback) { made.say = callback; made.state = 'joining'; return made },
    }
    this.order.push('join')
    this.channels.push(made)
    return made
  }

  getChannels() { return this.channels.filter((channel) => !channel.removed) }

  async removeChannel(channel) { channel.removed = true; channel.say?.('CLOSED'); return 'ok' }
}

const settled = async () => { for (let i = 0; i < 60; i++) await Promise.resolve() }

describe('the channel', () => {
  async function listening(options, live = null) {
    mock.timers.enable({ apis: ['setTimeout', 'Date'] })
    mock.method(Math, 'random', () => 0.5)
    const client = new Client(options)
    const own = live?.(client) ?? new Live(client, 'w')
    const heard = { statuses: [], messages: [], changes: [], syncs: 0, users: 0 }
    const stop = own.listen({
      onStatus: (status, error) => heard.statuses.push(error ? `${status} ${error.code}` : status),
      onProgress: (message) => heard.messages.push(message), onChange: (ids) => heard.changes.push(ids),
      onSync: () => { heard.syncs++ }, onUserChange: () => { heard.users++ },
    })
    await settled()
    return { client, live: own, heard, stop, last: () => client.channels.at(-1) }
  }
  const over = () => { mock.timers.reset(); mock.restoreAll() }

  test('the token comes before the join, and all listeners share one channel until a second after the last', async () => {
    const { client, live, stop } = await listening()
    assert.deepEqual(client.order, ['setAuth', 'join'])
    const second = live.listen({})
    await settled()
    stop()
    mock.timers.tick(5000)
    assert.equal(client.channels.length, 1)
    second()
    mock.timers.tick(900)
    const third = live.listen({}) // StrictMode comes back at once
    mock.timers.tick(5000)
    assert.equal(client.channels[0].removed, undefined)
    third()
    mock.timers.tick(1000)
    assert.equal(client.channels[0].removed, true)
    over()
  })

  for (const [status, error] of [['CLOSED'], ['TIMED_OUT'], ['CHANNEL_ERROR', new Error('socket closed: 1006')],
    ['CHANNEL_ERROR', new Error('InvalidJWTToken: Token has expired 3 seconds ago')]]) {
    test(`after ${status} ${error?.message ?? ''} it joins again, with growing pauses and a new token`, async () => {
      const { client, last, heard } = await listening()
      last().say('SUBSCRIBED')
      const pauses = []
      for (let i = 0; i < 7; i++) {
        last().say(status, error)
        await settled()
        const before = client.channels.length
        let waited = 0
        while (client.channels.length === before) { mock.timers.tick(500); waited += 500; await settled() }
        pauses.push(waited / 1000)
      }
      assert.deepEqual(pauses, [1, 2, 4, 8, 16, 30, 30])
      assert.equal(client.order.filter((step) => step === 'setAuth').length, 8)
      last().say('SUBSCRIBED')
      assert.equal(heard.syncs, 2, 'each subscription fetches what was missed')
      mock.timers.tick(20_000)
      last().say(status, error)
      mock.timers.tick(1000)
      await settled()
      assert.equal(client.channels.length, 9, 'a steady subscription begins anew with the pauses')
      over()
    })
  }

  test('a refusal is reported once and not tried again, until another user comes', async () => {
    const { client, last, heard } = await listening({ sessions: true })
    last().say('CHANNEL_ERROR', new Error('"Unauthorized: You do not have permissions to read from this Channel topic: tagging:w"'))
    mock.timers.tick(3_600_000)
    await settled()
    assert.deepEqual(heard.statuses, ['connecting', 'refused refused'])
    assert.equal(client.channels.length, 1)
    client.signed('SIGNED_IN', { user: { id: 'ann' } }) // a tab that gets the focus says this
    mock.timers.tick(1000)
    await settled()
    assert.equal(client.channels.length, 1)
    client.signed('TOKEN_REFRESHED', { user: { id: 'ann' } }) // once an hour: ann may be a member by now
    mock.timers.tick(1)
    await settled()
    assert.equal(client.channels.length, 2)
    last().say('CHANNEL_ERROR', new Error('Unauthorized: You do not have permissions'))
    assert.deepEqual(heard.statuses, ['connecting', 'refused refused'])
    client.user = 'ben'
    client.signed('SIGNED_IN', { user: { id: 'ben' } })
    mock.timers.tick(1)
    await settled()
    last().say('SUBSCRIBED')
    assert.equal(heard.statuses.at(-1), 'live')
    over()
  })

  test('after a sign-out nothing is heard, not even what was on its way', async () => {
    const { client, last, heard } = await listening({ sessions: true })
    last().say('SUBSCRIBED')
    last().hear('job-progress', { job_id: 'j', asset_ids: ['a'] })
    client.user = null
    client.signed('SIGNED_OUT', null)
    last().hear('job-progress', { job_id: 'j', asset_ids: ['b'] })
    await settled()
    assert.deepEqual(heard.changes, [['a']])
    assert.equal(client.channels[0].removed, true)
    assert.deepEqual([heard.users, heard.statuses.at(-1)], [1, 'signed-out'])
    over()
  })

  test('the user of a token provider changes without an event: their message is the first that is not heard', async () => {
    const { client, last, heard } = await listening()
    last().say('SUBSCRIBED')
    last().hear('job-progress', { job_id: 'j', asset_ids: ['a'] })
    await settled()
    const former = last()
    client.user = 'ben'
    former.hear('job-progress', { job_id: 'j', asset_ids: ['b'] })
    await settled()
    assert.deepEqual(heard.changes, [['a']])
    assert.equal(former.removed, true)
    assert.equal(heard.users, 1)
    over()
  })

  test('the server\'s own key joins, a publishable one and nobody do not', async () => {
    assert.equal(userOf(token({ role: 'anon' })), null)
    assert.equal(userOf('sb_publishable_x'), null)
    assert.equal(userOf(null), null)
    assert.equal(userOf(token({ role: 'service_role' })), 'service_role')
    assert.equal(userOf('sb_secret_x'), 'sb_secret_x')
    const { client, heard } = await listening({}, (client) => { client.user = null; return new Live(client, 'w') })
    assert.equal(client.channels.length, 0)
    assert.equal(heard.statuses.at(-1), 'signed-out')
    over()
  })

  test('a part of the page that comes when the channel is there already is told to fetch', async () => {
    const { live, last } = await listening()
    let syncs = 0
    live.listen({ onSync: () => { syncs++ } })
    assert.equal(syncs, 0)
    last().say('SUBSCRIBED')
    live.listen({ onSync: () => { syncs += 10 } })
    assert.equal(syncs, 11)
    over()
  })

  test('a part of the page that uses the topic by itself is named', async () => {
    const { client, heard } = await listening({}, (client) => { client.taken = true; return new Live(client, 'w') })
    assert.equal(heard.statuses.at(-1), 'connecting topic_in_use')
    client.taken = false
    mock.timers.tick(1000)
    await settled()
    client.channels.at(-1).say('SUBSCRIBED')
    assert.equal(heard.statuses.at(-1), 'live')
    over()
  })

  test('a part of the page that has made a channel of the topic keeps it, also before it subscribes', async () => {
    const theirs = {}
    const { client, heard, stop } = await listening({}, (client) => {
      Object.assign(theirs, client.channel('tagging:w'))
      const make = client.channel
      client.channel = function (topic) { return client.channels[0].removed ? make.call(client, topic) : client.channels[0] }
      return new Live(client, 'w')
    })
    assert.equal(heard.statuses.at(-1), 'connecting topic_in_use')
    assert.equal(client.channels[0].say, undefined, 'it is not subscribed for them')
    stop()
    mock.timers.tick(5000)
    assert.equal(client.channels[0].removed, undefined)
    over()
  })

  test('what a message lists instead of ids says that anything may have changed', async () => {
    const { last, heard } = await listening()
    last().say('SUBSCRIBED')
    const odd = ['abc', 5, {}, true, [null], [{}], [[1]], ['a', undefined], [2 ** 60], [1.5]]
    for (const asset_ids of odd) {
      for (const event of ['job-progress', 'job-complete']) last().hear(event, { job_id: 'j', asset_ids })
      last().hear('job-progress', { asset_ids, job_id: {} }) // of no upload
      await settled()
    }
    assert.deepEqual(heard.changes, odd.flatMap(() => [null, null, null]))
    assert.deepEqual([...new Set(heard.messages.map(({ job_id, asset_ids, many }) => `${job_id} ${asset_ids} ${many}`))], ['j null true'])
    assert.equal(heard.statuses.at(-1), 'live')
    over()
  })

  test('a message that another one of its upload has overtaken tells its rows and no count', async () => {
    const { live, last, heard } = await listening()
    live.listen({ onJobComplete: () => heard.messages.push('over') })
    last().say('SUBSCRIBED')
    const tell = async (event, completed, failed) => {
      last().hear(event, { job_id: 'j', completed, failed, image_count: 8, asset_ids: [completed] })
      await settled()
    }
    for (const counts of [[1, 0], [3, 1], [2, 1], [3, 1], [5, 0]]) await tell('job-progress', ...counts)
    await tell('job-complete', 6, 2)
    await tell('job-progress', 6, 2)
    await tell('job-complete', 6, 2)
    assert.deepEqual(heard.messages.map((told) => told.completed ?? told), [1, 3, 3, 5, 'over', 'over'])
    assert.deepEqual(heard.changes.flat(), [1, 3, 2, 3, 5, 6, 6, 6])
    over()
  })

  test('messages without ids (an older server) say that anything may have changed; with ids, a batch adds nothing', async () => {
    const { last, heard } = await listening()
    last().say('SUBSCRIBED')
    last().hear('batch-complete', { batch_id: 'b', job_id: 'j' })
    await settled()
    last().hear('job-progress', { job_id: 'j', asset_ids: null, many: true })
    await settled()
    last().hear('batch-complete', { batch_id: 'b', job_id: 'j' })
    last().hear('job-complete', { job_id: 'j', asset_ids: [1] })
    last().hear('job-complete', { job_id: 'j', asset_ids: [] })
    last().hear('job-complete', null)
    await settled()
    assert.deepEqual(heard.changes, [null, null, [1]])
    over()
  })

  test('numbers that JSON has rounded name no rows', async () => {
    const { last, heard } = await listening()
    last().say('SUBSCRIBED')
    last().hear('job-progress', JSON.parse('{"job_id": "j", "asset_ids": [7, 9007199254740993], "many": false}'))
    last().hear('job-progress', { job_id: 'j', asset_ids: ['9007199254740993'] })
    await settled()
    assert.deepEqual(heard.changes, [null, ['9007199254740993']])
    assert.deepEqual([heard.messages[0].asset_ids, heard.messages[0].many], [null, true])
    over()
  })

  test('a sign-out while the first join reads the token', async () => {
    mock.timers.enable({ apis: ['setTimeout', 'Date'] })
    const client = new Client({ sessions: true })
    let read
    client.realtime.setAuth = function () { return new Promise((resolve) => { read = () => { this.accessTokenValue = token({ sub: 'ann' }); resolve() } }) }
    const statuses = []
    new Live(client, 'w').listen({ onStatus: (status) => statuses.push(status) })
    await settled()
    client.signed('SIGNED_OUT', null)
    read() // as it was before
    await settled()
    assert.deepEqual([client.channels.length, statuses.at(-1)], [0, 'signed-out'])
    over()
  })

  test('what caches keep is forgotten with its user, also while nobody listens', async () => {
    for (const sessions of [true, false]) {
      const { client, live, last, stop } = await listening({ sessions })
      last().say('SUBSCRIBED')
      let forgotten = 0
      live.kept.set(client, () => { forgotten++ })
      stop()
      mock.timers.tick(2000)
      assert.equal(forgotten, sessions ? 0 : 1, 'a token provider would not tell that the user has changed')
      client.user = 'ben'
      client.signed?.('SIGNED_IN', { user: { id: 'ben' } })
      assert.equal(forgotten, 1)
      over()
    }
  })

  test('the newest accessToken counts: a component makes one with each render', async () => {
    mock.timers.enable({ apis: ['setTimeout', 'Date'] })
    const client = new Client()
    const given = []
    client.realtime.setAuth = async (newest) => { given.push(newest) }
    for (const user of ['old', 'new']) createAutotag(client, { workspaceId: 'w', accessToken: async () => token({ sub: user }) })
    createAutotag(client, { workspaceId: 'w' }).subscribe({})
    await settled()
    assert.deepEqual(given, [token({ sub: 'new' })])
    over()
  })

  test('a token provider that never answers a message stops that channel only', async () => {
    const { client, last, heard } = await listening()
    last().say('SUBSCRIBED')
    const { accessToken } = client.realtime
    client.realtime.accessToken = () => new Promise(() => undefined)
    last().hear('job-progress', { job_id: 'j', asset_ids: ['a'] })
    await settled()
    client.realtime.accessToken = accessToken
    last().say('CLOSED')
    mock.timers.tick(1000)
    await settled()
    last().say('SUBSCRIBED')
    last().hear('job-progress', { job_id: 'j', asset_ids: ['b'] })
    await settled()
    assert.deepEqual([heard.changes, heard.syncs], [[['b']], 2])
    over()
  })

  for (const given of [false, true]) {
    test(`a token that never comes is asked for again, at a join and at a message; ${given ? 'of accessToken' : 'of supabase-js'}`, async () => {
      const waiting = []
      let hangs = true
      const provide = () => hangs ? new Promise((resolve) => waiting.push(resolve)) : Promise.resolve(token({ sub: 'ann' }))
      const { client, heard, last } = await listening({}, (client) => {
        client.realtime.accessToken = provide
        if (given) client.realtime.setAuth = async (newest) => { client.order.push('setAuth'); client.realtime.accessTokenValue = newest }
        return new Live(client, 'w', given ? provide : undefined)
      })
      const pass = async (seconds) => { for (let i = 0; i < seconds * 2; i++) { mock.timers.tick(500); await settled() } }
      await pass(9)
      assert.deepEqual(heard.statuses, ['connecting'])
      hangs = false
      await pass(3)
      assert.equal(heard.statuses.at(1), 'connecting timeout')
      assert.equal(client.channels.length, 1, 'it is tried again')
      last().say('SUBSCRIBED')
      if (given) { // whoever asked has gone on
        const known = client.realtime.accessTokenValue
        for (const answer of waiting) answer(token({ sub: 'of another time' }))
        await settled()
        assert.equal(client.realtime.accessTokenValue, known)
      }
      hangs = true
      last().hear('job-progress', { job_id: 'j', asset_ids: ['lost'] })
      await settled()
      hangs = false
      last().hear('job-progress', { job_id: 'j', asset_ids: ['waits'] })
      await pass(12)
      assert.deepEqual(heard.statuses.slice(-2), ['connecting timeout', 'connecting'])
      last().say('SUBSCRIBED')
      last().hear('job-progress', { job_id: 'j', asset_ids: ['a'] })
      await settled()
      assert.deepEqual([heard.changes, heard.syncs, heard.statuses.at(-1)], [[['a']], 2, 'live'])
      over()
    })
  }

  test('a token provider that has nobody yet is asked again soon, and then not often', async () => {
    const { client, heard } = await listening({}, (client) => { client.user = null; return new Live(client, 'w') })
    const asked = () => client.order.filter((step) => step === 'setAuth').length
    for (let i = 0; i < 40; i++) { mock.timers.tick(500); await settled() } // 20 s
    assert.equal(asked(), 5)
    client.user = 'ann'
    for (let i = 0; i < 60; i++) { mock.timers.tick(500); await settled() }
    assert.equal(client.channels.length, 1)
    assert.deepEqual(heard.statuses.filter((status) => status === 'signed-out').length, 1)
    over()
  })

  test('who was refused tries again with a second factor', async () => {
    const { client, last } = await listening({ sessions: true })
    last().say('CHANNEL_ERROR', new Error('Unauthorized: You do not have permissions'))
    client.signed('MFA_CHALLENGE_VERIFIED', { user: { id: 'ann' } })
    mock.timers.tick(1)
    await settled()
    assert.equal(client.channels.length, 2)
    over()
  })

  test('a listener that throws does not silence the others', async () => {
    const { live, last, heard } = await listening()
    live.listen({ onSync() { throw new Error('theirs') } })
    live.listen({ onSync() { heard.after = true } })
    last().say('SUBSCRIBED')
    assert.equal(heard.after, true)
    assert.throws(() => mock.timers.tick(1), { message: 'theirs' }, 'the page hears of it, too')
    over()
  })
})

describe('the columns that autotag writes', () => {
  const cases = { // null: the whole list is fetched
    'id, created_at, tagging_stage, tags': ['a:id,b:tagging_stage,c:tags', 'id tagging_stage tags'],
    'id::text, stage:tagging_stage, members(id, name), tags': ['a:id::text,b:tagging_stage,c:tags', 'id stage tags'],
    'id, tagging_result->caption, because:tagging_result->image->>kind': ['a:id,b:tagging_result->caption,c:tagging_result->image->>kind', 'id caption because'],
    'id, tagging_eta::text': ['a:id,b:tagging_eta::text', 'id tagging_eta'],
    'id, tags(name), ...owner(tagging_stage)': ['a:id,b:tags(name)', 'id tags'],
    '*': [['id', ...WRITTEN].map((name, i) => `${'abcdefg'[i]}:${name}`).join(), `id ${WRITTEN.join(' ')}`],
    '*, owner:users(name)': null,
    'id, *': null,
    'created_at, tags': null,
    'id, tags->0': null,
    'id, "tags"': null,
  }
  for (const [select, wanted] of Object.entries(cases)) {
    test(select, () => {
      const lean = leanSelect(select.replace(/\s/g, ''), 'id', WRITTEN) // as supabase-js sends it
      assert.deepEqual(lean && [lean.select, Object.values(lean.names).join(' ')], wanted)
    })
  }
})

// -- lists of rows against a table in memory

/** Random numbers that are the same each time. */
function random(seed) {
  let state = seed
  return (below) => { // mulberry32
    state = (state + 0x6d2b79f5) | 0
    let mixed = Math.imul(state ^ (state >>> 15), 1 | state)
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed
    return ((mixed ^ (mixed >>> 14)) >>> 0) % below
  }
}

class Table {
  rows = new Map()
  requests = 0
  running = 0
  most = 0
  constructor(pick, maxRows = 1000) { Object.assign(this, { pick, maxRows }) }

  query(filter) {
    const table = this
    const conditions = [filter]
    let limit = table.maxRows
    let columns = '*'
    const below = (row, value, id) => row.at === null ? value === null && row.id < id : value !== null && (row.at < value || (row.at === value && row.id < id))
    const builder = {
      url: new URL('http://x/images?select=*'),
      select(list) { columns = list; return builder },
      filter(_, operator, list) {
        assert.match(`${operator}.${list}`, /^in\.\(\d+(,\d+)*\)$/)
        const ids = list.slice(1, -1).split(',')
        conditions.push((row) => ids.includes(String(row.id)))
        return builder
      },
      is() { return { lt: (_, id) => { conditions.push((row) => row.at === null && row.id < id); return builder } } },
      or(text) {
        const [, value, id] = /^at\.lt\."(\d+)",and\(at\.eq\."\d+",id\.lt\."(\d+)"\),at\.is\.null$/.exec(text)
        conditions.push((row) => row.at === null || below(row, Number(value), Number(id)))
        return builder
      },
      order() { return builder },
      limit(count) { limit = Math.min(count, table.maxRows); return builder },
      async run() {
        table.requests++
        if (table.hangs) return await new Promise(() => undefined)
        table.most = Math.max(table.most, ++table.running)
        for (let i = table.pick(4); i > 0; i--) await new Promise(setImmediate)
        const found = [...table.rows.values()].filter((row) => conditions.every((holds) => holds(row))).sort(order).slice(0, limit)
          .map((row) => columns === '*' ? { ...row } : Object.fromEntries(columns.split(',').map((item) => item.split(':')).filter(([, name]) => name in row).map(([letter, name]) => [letter, row[name]])))
        for (let i = table.pick(4); i > 0; i--) await new Promise(setImmediate)
        table.running--
        if (table.status != null) return { data: null, error: { message: 'no', code: '' }, status: table.status }
        return table.calm || table.pick(20) ? { data: found, error: null, status: 200 } : { data: null, error: { message: 'TypeError: fetch failed', code: '' }, status: 0 }
      },
      then(resolve, reject) { return builder.run().then(resolve, reject) },
    }
    return builder
  }
}

const order = (a, b) => (a.at === null) - (b.at === null) || b.at - a.at || b.id - a.id
const STAGES = [null, 'queued', 'submitted', 'processing', 'completed', 'failed']

describe('a list of rows', () => {
  test('shows after any history what the table has, and never what another user saw', { timeout: 60_000 }, async () => {
    mock.method(console, 'warn', () => undefined)
    for (let seed = 1; seed <= 150; seed++) {
      const pick = random(seed)
      const maxRows = [1000, 1000, 3, 7][pick(4)] // a project's own limit of an answer
      let [table, other] = [new Table(pick, maxRows), new Table(pick, maxRows)] // of the user, and of the next one
      const filter = pick(2) ? () => true : (row) => row.tags !== 'hidden'
      let listener
      const live = { liveSince: 0, listen: (given) => { listener = given; return () => undefined } }
      const queries = new QueryClient({ defaultOptions: { queries: { retry: 3, retryDelay: 1 } } })
      const list = new AssetList(queries, ['a'], live, { query: () => table.query(filter), key: 'id', orderBy: 'at', ascending: false, pageSize: 5, written: WRITTEN })
      const load = () => queries.fetchQuery({ queryKey: ['a'], queryFn: () => list.load(), staleTime: 0 }).catch(() => undefined)
      let [next, jobs] = [0, 0]
      const own = () => queries.getQueryData(['a'])?.rows.every((row) => row.id % 2 === (table.odd ? 1 : 0)) ?? true
      other.odd = true
      const insert = () => {
        const row = { id: (next += 2) + (table.odd ? 1 : 0), at: pick(8) ? pick(30) : null, tagging_stage: null, tags: pick(4) ? 'seen' : 'hidden' }
        table.rows.set(row.id, row)
        return row
      }
      for (let i = pick(25); i > 0; i--) insert()
      list.start()
      await load()
      const lists = seed % 2 // every change is told with its ids; otherwise some are not, and a subscription ends the history
      const told = (ids) => { if (lists || pick(4)) listener.onChange(pick(2) ? ids : ids.map(String), `job${pick(3)}`); else listener.onChange(null, `new job ${seed} ${jobs++}`) }
      for (let step = 0; step < 25; step++) {
        const ids = [...table.rows.keys()]
        const some = () => ids.length ? [ids[pick(ids.length)]] : []
        const what = pick(10)
        if (what === 0) { const row = insert(); if (filter(row)) list.put([{ ...row }]); told([row.id]) }
        else if (what === 1) told([insert().id])
        else if (what < 5) { for (const id of some()) table.rows.set(id, { ...table.rows.get(id), tagging_stage: STAGES[pick(6)], tags: pick(4) ? 'seen' : 'hidden' }); told(ids.length ? ids : []) }
        else if (what === 5) { const [id] = some(); table.rows.delete(id); if (id) told([id]) }
        else if (what === 6) void list.loadMore().catch(() => undefined)
        else if (what === 7) void load()
        else if (what === 8 && !pick(4)) { [table, other] = [other, table]; listener.onUserChange() }
        else if (!lists) listener.onSync()
        for (let i = pick(6); i > 0; i--) { await new Promise(setImmediate); assert.ok(own(), `seed ${seed}: another user's rows`) }
      }
      table.calm = other.calm = true
      live.liveSince = Infinity
      if (!lists) listener.onSync()
      const shown = () => queries.getQueryData(['a'])
      const right = () => {
        const data = shown()
        const wanted = [...table.rows.values()].filter(filter).sort(order)
        assert.deepEqual(data.rows, wanted.slice(0, data.rows.length), `seed ${seed}: the rows`)
        assert.ok(data.rows.length >= Math.min(5, wanted.length), `seed ${seed}: at least a page`)
        if (!data.hasMore) assert.equal(data.rows.length, wanted.length, `seed ${seed}: there are more`)
      }
      for (let patience = 1000; ; patience--) {
        for (let i = 0; i < 20; i++) await new Promise(setImmediate)
        try { right(); break } catch (error) { if (!patience) throw error; await new Promise((resolve) => setTimeout(resolve, 20)) }
      }
      assert.ok(table.most <= 1 && other.most <= 1, `seed ${seed}: one request at a time`)
      list.stop()
      queries.clear()
    }
    mock.restoreAll()
  })
})

test('a list that was hidden while messages came fetches again, and goes on after an outage of any length', async () => {
  const table = new Table(() => 1)
  table.rows.set(1, { id: 1, at: 1, tagging_stage: null, tags: 'seen' })
  let listener
  const live = { liveSince: 1, listen: (given) => { listener = given; given.onSync(); return () => undefined } }
  const queries = new QueryClient()
  const list = new AssetList(queries, ['a'], live, { query: () => table.query(() => true), key: 'id', orderBy: 'at', ascending: false, pageSize: 5, written: WRITTEN })
  const stage = () => queries.getQueryData(['a']).rows[0].tagging_stage
  await queries.fetchQuery({ queryKey: ['a'], queryFn: () => list.load() })
  list.start()
  list.stop() // <Activity mode="hidden">: other parts of the page keep the channel
  table.rows.set(1, { ...table.rows.get(1), tagging_stage: 'failed' })
  list.start()
  await until(() => stage() === 'failed')
  mock.timers.enable({ apis: ['setTimeout'] })
  mock.method(console, 'warn', () => undefined)
  for (const [status, goesOn, who] of [[503, true], [401, true], [0, true], [400, false], [401, false, 'signed-out']]) {
    table.status = status
    live.status = who
    table.rows.set(1, { ...table.rows.get(1), tagging_stage: 'queued' })
    listener.onChange([1], 'j')
    const before = table.requests
    for (let i = 0; i < 20; i++) { for (let j = 0; j < 20; j++) await new Promise(setImmediate); mock.timers.tick(30_000) }
    assert.equal(table.requests - before > 10, goesOn, `${status}: ${table.requests - before} requests`)
    table.status = null
    listener.onChange([1], 'j')
    for (let i = 0; i < 5; i++) { for (let j = 0; j < 20; j++) await new Promise(setImmediate); mock.timers.tick(30_000) }
    assert.equal(stage(), 'queued')
    table.rows.set(1, { ...table.rows.get(1), tagging_stage: 'failed' })
  }
  mock.timers.reset()
  mock.restoreAll()
  queries.clear()
})

test('a request that never ends is given up, and the next one has what it was for and what was told meanwhile', async () => {
  mock.timers.enable({ apis: ['setTimeout'] })
  const table = new Table(() => 1)
  for (const id of [1, 2]) table.rows.set(id, { id, at: id, tagging_stage: 'queued', tags: 'seen' })
  let listener
  const live = { liveSince: 0, listen: (given) => { listener = given; return () => undefined } }
  const queries = new QueryClient({ defaultOptions: { queries: { retry: 3, retryDelay: 1 } } })
  const signals = []
  const query = () => Object.assign(table.query(() => true), { abortSignal(signal) { signals.push(signal) } })
  const list = new AssetList(queries, ['a'], live, { query, key: 'id', orderBy: 'at', ascending: false, pageSize: 5, written: WRITTEN })
  list.start()
  const pass = async (seconds) => { for (let i = 0; i <= seconds; i++) { for (let j = 0; j < 30; j++) await new Promise(setImmediate); mock.timers.tick(1000) } }
  const load = () => queries.fetchQuery({ queryKey: ['a'], queryFn: () => list.load(), staleTime: 0 }).catch(() => undefined)
  const shown = () => queries.getQueryData(['a'])?.rows.map((row) => row.tagging_stage).join()
  for (const what of ['changes', 'everything', 'a first load', 'a load', 'more']) {
    if (what === 'a first load') queries.removeQueries({ queryKey: ['a'] })
    else { void load(); await pass(1) }
    for (const row of table.rows.values()) row.tagging_stage = 'failed'
    table.hangs = true
    const before = table.requests
    if (what === 'everything') listener.onChange(null, what)
    else if (what === 'changes') listener.onChange([1], 'j')
    else if (what === 'more') { list.put([]); queries.setQueryData(['a'], (data) => ({ ...data, hasMore: true })); list.loadMore().catch(() => undefined) }
    else void load()
    await pass(1)
    assert.equal(table.requests, before + 1, what)
    table.hangs = false
    listener.onChange([2], 'j')
    await pass(25)
    assert.equal(table.requests, before + 1, `${what}: one request at a time`)
    await pass(10)
    assert.ok(signals.some((signal) => signal.aborted), `${what}: the request ends`)
    assert.match(shown() ?? '', what === 'more' ? /failed$|^failed/ : /^failed,failed$/, what)
    for (const row of table.rows.values()) row.tagging_stage = 'queued'
    signals.length = 0
    listener.onChange([1, 2], 'j')
    await pass(3)
    assert.equal(shown(), 'queued,queued', what)
  }
  mock.timers.reset()
  queries.clear()
})

for (const [maxRows, pageSize] of [[1000, 1500], [1000, 1000], [300, 1500], [7, 20]]) {
  test(`pages of ${pageSize} rows, of a project that answers with at most ${maxRows}`, async () => {
    const table = new Table(() => 1, maxRows)
    for (let id = 1; id <= pageSize * 2 + 5; id++) table.rows.set(id, { id, at: id, tagging_stage: 'queued', tags: 'seen' })
    let listener
    const live = { liveSince: 0, listen: (given) => { listener = given; return () => undefined } }
    const queries = new QueryClient()
    const list = new AssetList(queries, ['a'], live, { query: () => table.query(() => true), key: 'id', orderBy: 'at', ascending: false, pageSize, written: WRITTEN })
    list.start()
    await queries.fetchQuery({ queryKey: ['a'], queryFn: () => list.load() })
    const shown = () => { const { rows, hasMore } = queries.getQueryData(['a']); return [rows.length, rows.at(-1).id, hasMore] }
    assert.deepEqual(shown(), [pageSize, pageSize + 6, true])
    for (const id of table.rows.keys()) table.rows.set(id, { ...table.rows.get(id), tagging_stage: 'failed' })
    listener.onChange([...table.rows.keys()].slice(-pageSize), 'j')
    await until(() => queries.getQueryData(['a']).rows.every((row) => row.tagging_stage === 'failed'))
    assert.deepEqual(shown(), [pageSize, pageSize + 6, true])
    await list.loadMore()
    assert.deepEqual(shown(), [pageSize * 2, 6, true])
    await list.loadMore()
    assert.deepEqual(shown(), [pageSize * 2 + 5, 1, false])
    queries.clear()
  })
}

/** Uploads with a server that answers when the test says: `answers` are of its calls, in order. `recent`: its newest ones, at once. */
function uploads(recent = () => []) {
  const [answers, asked] = [[], []]
  const ask = (what) => new Promise((resolve, reject) => { asked.push(what); answers.push({ resolve, reject }) })
  let listener
  const autotag = { jobs: async ({ onlyLive, limit }) => onlyLive ? await ask('jobs') : recent(limit), job: (id) => ask(id), subscribe: (given) => { listener = given; return () => undefined } }
  const queries = new QueryClient()
  const next = async (answer) => { await until(() => answers.length); answers.shift().resolve(answer) }
  return { autotag, queries, answers, asked, next, tell: (name, ...args) => listener[name](...args) }
}
const upload = (job_id, completed, finished_at = null) => ({ job_id, created_at: `2026-11-29T12:00:00.${999 - job_id.charCodeAt(0)}Z`, image_count: 8, completed, failed: 0, progress: completed, eta: null, finished_at })
const message = (job_id, completed) => ({ job_id, image_count: 8, completed, failed: 0, progress: completed, eta: null })

test('what is told of uploads while they are fetched counts, whichever is newer', async () => {
  const { autotag, queries, next, tell } = uploads()
  const list = new JobList(queries, ['jobs'], autotag)
  list.start()
  const shown = () => queries.getQueryData(['jobs']).map((job) => `${job.job_id} ${job.completed}${job.finished_at ? ' over' : ''}`).join()
  const load = async (rows) => {
    const loaded = queries.fetchQuery({ queryKey: ['jobs'], queryFn: () => list.load(), staleTime: 0 })
    tell('onJobComplete', message('ends', 8))
    tell('onProgress', message('goes on', 3))
    tell('onProgress', message('is ahead', 2))
    list.patch({ job_id: 'begins', image_count: 8, eta: 'soon' })
    await next(rows)
    await loaded
  }
  const rows = [upload('ends', 7), upload('goes on', 1), upload('is ahead', 5)]
  await load(rows)
  assert.equal(shown(), 'begins 0,ends 8 over,goes on 3,is ahead 5')
  await load(rows)
  assert.equal(shown(), 'begins 0,ends 8 over,goes on 3,is ahead 5')
  queries.clear()
})

test('an upload that has ended while no message came stays, and is over; one that is gone goes', async () => {
  const { autotag, queries, answers, asked, next, tell } = uploads()
  const list = new JobList(queries, ['jobs'], autotag)
  list.start()
  void list.refresh()
  await next([upload('a', 1), upload('b', 1), upload('c', 1)])
  await until(() => queries.getQueryData(['jobs']))
  tell('onSync')
  await next([upload('c', 2)])
  await until(() => answers.length === 2)
  assert.deepEqual(asked, ['jobs', 'jobs', 'a', 'b'])
  list.patch({ job_id: 'd', image_count: 8, eta: null }) // this page begins one meanwhile
  answers.shift().resolve(upload('a', 8, 'then'))
  answers.shift().reject(new AutotagError('unknown_job', 'no'))
  const shown = () => queries.getQueryData(['jobs']).map((job) => `${job.job_id} ${job.completed}`).join()
  await until(() => shown() === 'd 0,a 8,c 2')
  tell('onSync')
  await next([upload('d', 1)])
  await next(upload('c', 8, 'then'))
  await until(() => shown() === 'a 8,c 8,d 1')
  assert.deepEqual(asked.slice(4), ['jobs', 'c'], 'what is over is not fetched again')
  tell('onJobComplete', message('b', 8)) // of another window
  assert.equal(shown(), 'b 8,a 8,c 8,d 1')
  tell('onSync')
  await next([upload('d', 1)])
  await next(upload('b', 8, 'then'))
  await until(() => shown() === 'a 8,b 8,c 8,d 1')
  queries.clear()
})

test('uploads that began and ended while this page was away come with the next load; those from before do not', async () => {
  let newest = [upload('b', 8, 'before'), upload('c', 8, 'before')]
  const limits = []
  const { autotag, queries, next, tell } = uploads((limit) => { limits.push(limit); return newest.slice(0, limit) })
  const list = new JobList(queries, ['jobs'], autotag)
  list.start()
  const shown = () => queries.getQueryData(['jobs'])?.map((job) => `${job.job_id} ${job.completed}`).join()
  const first = queries.fetchQuery({ queryKey: ['jobs'], queryFn: () => list.load() })
  await next([upload('d', 1)])
  await first
  assert.equal(shown(), 'd 1')
  newest = [upload('Z', 8, 'meanwhile'), ...newest, upload('d', 8, 'meanwhile')] // Z, d: of other windows
  tell('onSync')
  await next([])
  await until(() => shown() === 'Z 8,d 8')
  assert.deepEqual(limits, [1, 20])
  tell('onUserChange')
  await next([])
  await new Promise((resolve) => setTimeout(resolve, 5))
  assert.equal(shown(), '', "a former user's time is not the next one's")
  queries.clear()
})

test('thousands of uploads of others: the list has its bound, and a reconnect asks for few of them', async () => {
  const calls = { jobs: 0, job: 0, at: 0, most: 0 }
  const call = async (name, answer) => {
    calls[name]++
    calls.most = Math.max(calls.most, ++calls.at)
    await new Promise(setImmediate)
    calls.at--
    return answer
  }
  let listener
  const rows = Array.from({ length: 3000 }, (_, i) => ({ ...upload('', 8, 'then'), job_id: `j${i}`, created_at: new Date(i).toISOString() })).reverse()
  const autotag = {
    subscribe: (given) => { listener = given; return () => undefined },
    jobs: ({ onlyLive, limit }) => call('jobs', onlyLive ? [] : rows.slice(0, limit)),
    job: (id) => call('job', rows.find((row) => row.job_id === id)),
  }
  const queries = new QueryClient()
  const list = new JobList(queries, ['jobs'], autotag)
  const shown = () => queries.getQueryData(['jobs'])
  list.start()
  list.patch({ job_id: 'runs', image_count: 8 })
  let longest = 0
  const stop = queries.getQueryCache().subscribe(() => { longest = Math.max(longest, shown()?.length ?? 0) })
  for (const { job_id } of [...rows].reverse()) {
    listener.onProgress(message(job_id, 1))
    listener.onJobComplete(message(job_id, 8))
  }
  assert.deepEqual([shown().length, longest, shown()[0].job_id, shown().at(-1).job_id], [100, 100, 'j2999', 'runs'])
  rows.unshift(upload('runs', 8, 'then'))
  listener.onSync()
  await until(() => shown().every((job) => job.created_at))
  assert.deepEqual([calls.jobs, calls.job, shown().length], [2, 0, 100])
  list.patch({ job_id: 'runs', finished_at: undefined })
  for (const { job_id } of rows.slice(-90)) listener.onProgress(message(job_id, 1)) // not among the newest
  calls.most = 0
  listener.onSync()
  await until(() => calls.jobs === 4 && shown().every((job) => job.created_at))
  assert.ok(calls.job <= 100 && calls.most <= 4, JSON.stringify(calls))
  stop()
  queries.clear()
})

describe('an upload, whatever overtakes what', () => {
  for (const kind of ['list', 'one']) {
    test(`a message between the end of a fetch and its place in the cache counts: ${kind}`, async () => {
      for (let gap = 0; gap < 12; gap++) {
        const { autotag, queries, next, tell } = uploads()
        const shared = kind === 'list' ? new JobList(queries, ['x'], autotag) : new OneJob(queries, ['x'], autotag, 'a')
        shared.start()
        const fetched = queries.fetchQuery({ queryKey: ['x'], async queryFn() {
          const data = await shared.load()
          void (async () => { for (let i = 0; i < gap; i++) await null; tell('onProgress', message('a', 5)) })()
          return data
        } })
        await next(kind === 'list' ? [upload('a', 1)] : upload('a', 1))
        await fetched
        await until(() => [queries.getQueryData(['x'])].flat()[0].completed === 5)
        queries.clear()
      }
    })
  }

  /** The states that the database has of an upload, in order, and what is told of each. */
  function history(pick, job_id) {
    const image_count = 1 + pick(6)
    const row = { ...upload('', 0), job_id, created_at: new Date(1e12 + pick(1e6)).toISOString(), image_count, progress: 0, status: 'running', cancelled: false }
    const states = [row]
    const ends = pick(2) ? 'cancelled' : 'completed'
    for (let last = row; last.completed + last.failed < image_count; states.push(last)) {
      last = { ...last, [pick(3) ? 'completed' : 'failed']: 0, progress: Math.min(99, last.progress + pick(20)), eta: `${pick(9)}` }
      const before = states.at(-1)
      for (const name of ['completed', 'failed']) last[name] = before[name]
      if (pick(3)) last[pick(3) ? 'completed' : 'failed']++
      if (ends === 'cancelled' && pick(2)) Object.assign(last, { status: 'cancelling', cancelled: true })
    }
    const all = states.at(-1)
    states.push({ ...all, status: ends, cancelled: ends === 'cancelled', progress: 100, eta: null, finished_at: 'then' })
    return states.map((state, i) => {
      const { progress, eta, status, completed, failed } = state
      const told = { job_id, image_count, completed, failed, status }
      return { state, event: i < states.length - 1 ? 'onProgress' : 'onJobComplete', told: i < states.length - 1 ? { ...told, progress, eta } : told }
    })
  }

  for (const kind of ['list', 'one']) {
    test(`${kind === 'list' ? 'a list' : 'one upload'} never goes back, and ends as the database has it`, { timeout: 60_000 }, async () => {
      for (let seed = 1; seed <= 200; seed++) {
        const pick = random(seed)
        const steps = Array.from({ length: kind === 'list' ? 3 : 1 }, (_, i) => history(pick, `j${i}`))
        const at = steps.map(() => 0)
        const queue = []
        let now = []
        const look = () => { now = steps.map((all, i) => all[at[i]].state) }
        const delay = async () => { for (let i = pick(6); i > 0; i--) await new Promise(setImmediate) }
        const answer = async (take) => { await delay(); look(); const taken = take(now); await delay(); return taken }
        let listener
        const autotag = {
          subscribe: (given) => { listener = given; return () => undefined },
          jobs: ({ onlyLive, limit }) => answer((rows) => onlyLive ? rows.filter((row) => !row.finished_at) : rows.slice(0, Math.max(limit, 3))),
          job: (id) => answer((rows) => rows.find((row) => row.job_id === id)),
        }
        const queries = new QueryClient()
        const shared = kind === 'list' ? new JobList(queries, ['x'], autotag) : new OneJob(queries, ['x'], autotag, 'j0')
        const shown = () => [queries.getQueryData(['x']) ?? []].flat()
        const [furthest, back] = [new Map(), []]
        const stop = queries.getQueryCache().subscribe(() => {
          for (const { job_id, completed, failed, finished_at, cancelled, progress } of shown()) {
            const before = furthest.get(job_id) ?? { done: 0, over: false, cancelled: false, progress: 0 }
            const seen = { done: completed + failed, over: Boolean(finished_at), cancelled: Boolean(cancelled), progress }
            if (Object.keys(seen).some((name) => seen[name] < before[name])) back.push(`${job_id} went back from ${JSON.stringify(before)} to ${JSON.stringify(seen)}`)
            furthest.set(job_id, seen)
          }
        })
        shared.start()
        void queries.fetchQuery({ queryKey: ['x'], queryFn: () => shared.load() })
        while (at.some((index, i) => index < steps[i].length - 1) || queue.length) {
          const what = pick(8)
          const which = pick(steps.length)
          if (what < 3 && at[which] < steps[which].length - 1) queue.push(...Array.from({ length: pick(3) }, () => steps[which][at[which] + 1])), at[which]++
          else if (what < 6 && queue.length) { const [message] = queue.splice(pick(queue.length), 1); listener[message.event](message.told) }
          else if (what === 6) listener.onSync()
          else await delay()
        }
        listener.onSync()
        const wanted = () => steps.map((all) => all.at(-1).state)
        const right = () => assert.deepEqual([...shown()].sort((a, b) => a.job_id < b.job_id ? -1 : 1), wanted(), `seed ${seed}`)
        for (let patience = 300; ; patience--) {
          await new Promise(setImmediate)
          if (queries.isFetching()) continue
          try { right(); break } catch (error) { if (!patience) throw error }
        }
        for (let i = 0; i < 10; i++) { const { event, told } = steps[pick(steps.length)].at(-1 - pick(2)); listener[event](told) } // late, and twice
        await delay()
        right()
        assert.deepEqual(back, [], `seed ${seed}`)
        stop()
        queries.clear()
      }
    })
  }
})

test('a fetch that ran before the subscription is followed by another one, for a list and for one upload', async () => {
  for (const make of [(...args) => new JobList(...args), (...args) => new OneJob(...args, 'a')]) {
    const { autotag, queries, asked, next, tell } = uploads()
    const list = make(queries, ['x'], autotag)
    list.start()
    void queries.fetchQuery({ queryKey: ['x'], queryFn: () => list.load() })
    await until(() => asked.length === 1)
    tell('onSync')
    const [before, after] = [upload('a', 7), upload('a', 8, 'then')]
    const wrap = (job) => list instanceof JobList ? [job] : job
    await next(wrap(before))
    await next(wrap(after))
    await until(() => [queries.getQueryData(['x'])].flat()[0].completed === 8)
    queries.clear()
  }
})

test('one upload: its end is told during a fetch, and none is nothing to ask for', async () => {
  const { autotag, queries, next, tell } = uploads()
  const one = new OneJob(queries, ['job'], autotag, 'a')
  one.start()
  const loaded = queries.fetchQuery({ queryKey: ['job'], queryFn: () => one.load() })
  tell('onProgress', message('a', 8))
  await next(upload('a', 7))
  assert.equal((await loaded).completed, 8)
  const none = new OneJob(queries, ['none'], { job: () => assert.fail('asked'), subscribe: () => assert.fail('listens') }, null)
  none.start()
  none.stop()
  queries.clear()
})

test('uploads of a user who has left are not shown to the next one, whenever their answer comes', async () => {
  const { autotag, queries, answers, next, tell } = uploads()
  const list = new JobList(queries, ['jobs'], autotag)
  list.start()
  const shown = () => queries.getQueryData(['jobs']).map((job) => job.job_id).join()
  const first = queries.fetchQuery({ queryKey: ['jobs'], queryFn: () => list.load() })
  await next([upload("ann's", 1), upload("ann's, done", 8, 'then')])
  await first
  assert.equal(shown(), "ann's,ann's, done")
  void list.refresh() // ann's token asks
  tell('onProgress', message("ann's", 2))
  tell('onUserChange')
  assert.equal(shown(), '')
  await next([upload("ann's", 1)])
  for (const user of ['ben', 'ben', 'cat']) {
    await until(() => answers.length)
    assert.equal(shown(), '')
    if (user === 'ben') tell('onUserChange')
    await next([upload(`${user}'s`, 1)])
  }
  await until(() => shown() === "cat's")
  queries.clear()
})

test('one upload of a user who has left is not shown to the next one', async () => {
  const { autotag, queries, answers, next, tell } = uploads()
  const one = new OneJob(queries, ['job'], autotag, "ann's")
  one.start()
  const observed = new QueryObserver(queries, { queryKey: ['job'], queryFn: () => one.load(), staleTime: Infinity, retry: false })
  const stop = observed.subscribe(() => undefined)
  await next(upload("ann's", 0))
  await until(() => observed.getCurrentResult().data)
  tell('onProgress', message("ann's", 1))
  assert.equal(observed.getCurrentResult().data.completed, 1)
  void one.refresh()
  tell('onUserChange')
  assert.equal(observed.getCurrentResult().data, undefined)
  await next(upload("ann's", 1))
  await until(() => answers.length)
  assert.equal(observed.getCurrentResult().data, undefined)
  stop()
  queries.clear()
})

test('what nobody may see is fetched for the user who signs in, without any channel', async () => {
  const { autotag, queries: cache, asked, next, tell } = uploads()
  const jobs = new JobList(cache, ['jobs'], autotag)
  jobs.start()
  autotag.status = 'signed-out'
  tell('onUserChange')
  await new Promise((resolve) => setTimeout(resolve, 5))
  assert.deepEqual(asked, [])
  autotag.status = 'connecting'
  tell('onUserChange')
  await next([upload("ben's", 1)])
  await until(() => cache.getQueryData(['jobs']).length)
  const table = new Table(() => 1)
  table.rows.set(1, { id: 1, at: 1, tagging_stage: 'queued', tags: 'seen' })
  table.status = 401
  let listener
  const live = { liveSince: Infinity, listen: (given) => { listener = given; return () => undefined } }
  const queries = new QueryClient()
  const list = new AssetList(queries, ['a'], live, { query: () => table.query(() => true), key: 'id', orderBy: 'at', ascending: false, pageSize: 3, written: WRITTEN })
  list.start()
  const observed = new QueryObserver(queries, { queryKey: ['a'], queryFn: () => list.load(), retry: false })
  const stop = observed.subscribe(() => undefined)
  await until(() => observed.getCurrentResult().isError)
  table.status = null
  listener.onUserChange()
  await until(() => observed.getCurrentResult().data?.rows.length === 1)
  stop()
  queries.clear()
})

test('a row that is touched moves to its new place, and below what is loaded it leaves', async () => {
  const table = new Table(() => 1)
  let listener
  const live = { liveSince: 0, listen: (given) => { listener = given; return () => undefined } }
  const queries = new QueryClient()
  const list = new AssetList(queries, ['a'], live, { query: () => table.query(() => true), key: 'id', orderBy: 'at', ascending: false, pageSize: 3, written: WRITTEN })
  for (let id = 1; id <= 6; id++) table.rows.set(id, { id, at: id, tagging_stage: 'queued', tags: 'seen' })
  list.start()
  await queries.fetchQuery({ queryKey: ['a'], queryFn: () => list.load() })
  const shown = () => queries.getQueryData(['a']).rows.map((row) => row.id).join()
  assert.equal(shown(), '6,5,4')
  const touch = (id, at) => { table.rows.set(id, { ...table.rows.get(id), at }); listener.onChange([id], 'j') }
  touch(4, 9)
  await until(() => shown() === '4,6,5')
  touch(2, 8)
  await until(() => shown() === '4,2,6,5')
  touch(4, 0)
  await until(() => shown() === '2,6,5')
  queries.clear()
})

test('rows that came above meanwhile: what is loaded stays without gaps, and nothing of it stays as it was', async () => {
  const table = new Table(() => 1)
  let listener
  const live = { liveSince: 0, listen: (given) => { listener = given; return () => undefined } }
  const queries = new QueryClient()
  const list = new AssetList(queries, ['a'], live, { query: () => table.query(() => true), key: 'id', orderBy: 'at', ascending: false, pageSize: 3, written: WRITTEN })
  const insert = (id) => table.rows.set(id, { id, at: id, tagging_stage: 'queued', tags: 'seen' })
  for (let id = 1; id <= 9; id++) insert(id)
  list.start()
  const load = () => queries.fetchQuery({ queryKey: ['a'], queryFn: () => list.load() })
  const shown = () => queries.getQueryData(['a']).rows.map((row) => `${row.id}${row.tagging_stage[0]}`).join()
  await load()
  insert(10)
  insert(11)
  await Promise.all([load(), list.loadMore()])
  assert.equal(shown(), '11q,10q,9q,8q,7q,6q')
  insert(12) // while the channel was away
  table.rows.set(6, { ...table.rows.get(6), tagging_stage: 'failed' })
  live.liveSince = Infinity
  listener.onSync()
  await until(() => shown().startsWith('12q'))
  assert.doesNotMatch(shown(), /6q/)
  queries.clear()
})

test('the address of a query: a function has its arguments in the body', () => {
  const rpc = (body) => () => ({ url: new URL('http://x/rest/v1/rpc/images_with_tags?select=id'), schema: 'public', body })
  assert.equal(new Set([rpc({ wanted: ['a'] }), rpc({ wanted: ['b'] }), rpc(undefined)].map(addressOf)).size, 3)
})

test('ids that are any text stay one list of values, in addresses that proxies take', async () => {
  const asked = []
  const url = new URL('http://x/images?select=*')
  const builder = { url, order: () => builder, limit: () => builder, select: () => builder, then: (resolve) => resolve({ data: [], error: null, status: 200 }),
    filter(column, operator, list) { asked.push(new URLSearchParams({ [column]: `${operator}.${list}` }).toString()); return builder } }
  let listener
  const live = { liveSince: 0, listen: (given) => { listener = given; return () => undefined } }
  const queries = new QueryClient()
  const list = new AssetList(queries, ['a'], live, { query: () => builder, key: 'id', orderBy: 'at', ascending: false, pageSize: 3, written: WRITTEN })
  list.start()
  await queries.fetchQuery({ queryKey: ['a'], queryFn: () => list.load() })
  const ids = ['a,b', 'a"b)', 'c\\', 'plain-1', ...Array.from({ length: 90 }, (_, i) => `${'写真'.repeat(9)}${i}`)]
  listener.onChange(ids, 'j')
  await until(() => asked.length >= 4 && !asked.at(-1).includes('undefined'))
  for (const line of asked) assert.ok(line.length < 5000, `${line.length} characters`)
  const read = asked.flatMap((line) => [...new URLSearchParams(line).get('id').matchAll(/"((?:[^"\\]|\\.)*)"|([\w-]+)(?=[,)])/g)].map(([, quoted, bare]) => bare ?? quoted.replace(/\\(.)/g, '$1')))
  assert.deepEqual(read.slice(0, 4), ids.slice(0, 4))
  queries.clear()
})

test('without ids, a row that looks done is fetched once for each upload, and one that is being tagged each time', async () => {
  const table = new Table(() => 1)
  let listener
  const live = { liveSince: 0, listen: (given) => { listener = given; return () => undefined } }
  const queries = new QueryClient()
  const list = new AssetList(queries, ['a'], live, { query: () => table.query(() => true), key: 'id', orderBy: 'at', ascending: false, pageSize: 2, written: WRITTEN })
  for (let id = 1; id <= 6; id++) table.rows.set(id, { id, at: id, tagging_stage: 'completed', tags: 'seen' })
  list.start()
  await queries.fetchQuery({ queryKey: ['a'], queryFn: () => list.load() })
  await list.loadMore()
  await list.loadMore()
  const stages = () => queries.getQueryData(['a']).rows.map((row) => row.tagging_stage)
  for (const stage of ['queued', 'processing', 'completed']) {
    table.rows.set(1, { ...table.rows.get(1), tagging_stage: stage })
    listener.onChange(null, 'job')
    await until(() => stages().at(-1) === stage)
  }
  assert.equal(stages().length, 6)
  const { requests } = table
  listener.onChange(null, 'job')
  await until(() => table.requests > requests)
  queries.clear()
})

async function until(holds) {
  for (let patience = 1000; !holds(); patience--) {
    assert.ok(patience, String(holds))
    await new Promise((resolve) => setTimeout(resolve, 5))
  }
}

test('one fetch at a time, and what changes meanwhile goes into the next one', async () => {
  const asked = []
  const ends = []
  const changed = oneAtATime(async (ids) => { asked.push(ids); await new Promise((resolve, reject) => ends.push({ resolve, reject })) })
  const all = [changed([1]), changed([2]), changed([2, 3])]
  assert.deepEqual(asked, [[1]])
  ends[0].resolve()
  await settled()
  assert.deepEqual(asked, [[1], [2, 3]])
  changed([4])
  changed(null)
  changed([5])
  ends[1].resolve()
  await settled()
  assert.deepEqual(asked.at(-1), null)
  ends[2].resolve()
  await Promise.all(all)
  const failed = changed([6])
  ends[3].reject(new Error('offline'))
  await assert.rejects(failed, { message: 'offline' })
  void changed([7])
  assert.deepEqual(asked.at(-1), [6, 7], 'what has failed is not forgotten')
  ends[4].resolve()
  let calls = 0
  const broken = oneAtATime(() => { calls++; throw new Error('at once') })
  for (let i = 0; i < 2; i++) await assert.rejects(broken([1]), { message: 'at once' })
  assert.equal(calls, 2)
})

test('a fetch that never ends is given up; what it was for goes into the next one, at once if something has changed', async () => {
  mock.timers.enable({ apis: ['setTimeout'] })
  const asked = []
  const changed = oneAtATime((ids, signal) => new Promise((resolve) => { asked.push({ ids, signal, resolve }) }))
  const running = changed([1])
  void changed([2])
  await settled()
  mock.timers.tick(29_999)
  await settled()
  assert.deepEqual(asked.map(({ ids }) => ids), [[1]])
  mock.timers.tick(1)
  await settled()
  assert.deepEqual([asked.map(({ ids }) => ids), asked[0].signal.aborted, asked[1].signal.aborted], [[[1], [2, 1]], true, false])
  asked[0].resolve() // too late
  await settled()
  assert.equal(asked.length, 2)
  asked[1].resolve()
  await running
  const alone = changed([3])
  mock.timers.tick(30_000)
  await assert.rejects(alone, { code: 'timeout' })
  void changed([4])
  assert.deepEqual(asked.at(-1).ids, [3, 4])
  asked.at(-1).resolve()
  const short = oneAtATime(() => new Promise(() => undefined), 500)([1])
  mock.timers.tick(500)
  await assert.rejects(short, { code: 'timeout' })
  mock.timers.reset()
})

test('calls that read are given up, those that write are not; a list of uploads goes on', async () => {
  mock.timers.enable({ apis: ['setTimeout'] })
  const client = new Client()
  const [signals, asked] = [[], []]
  let hangs = true
  client.rpc = (name, args) => {
    asked.push(name)
    const answer = hangs ? new Promise(() => undefined) : Promise.resolve({ data: args.only_live ? [upload('a', 1)] : [], error: null, status: 200 })
    return Object.assign(answer, { abortSignal: (signal) => signals.push(signal) })
  }
  const autotag = createAutotag(client, { workspaceId: 'w' })
  const ended = []
  const reads = [autotag.jobs(), autotag.job('j'), autotag.strategy(5), autotag.usage(), autotag.peekRateLimit('batch', 5)]
  const writes = [autotag.enqueue(['a']), autotag.cancel('j'), autotag.retry('j')]
  for (const call of [...reads, ...writes]) call.catch((error) => ended.push(error.code))
  mock.timers.tick(30_000)
  await settled()
  assert.deepEqual(ended, reads.map(() => 'timeout'))
  assert.ok(signals.length === reads.length && signals.every((signal) => signal.aborted))
  const queries = new QueryClient({ defaultOptions: { queries: { retryDelay: 1 } } })
  let listener
  const list = new JobList(queries, ['jobs'], { jobs: autotag.jobs, job: autotag.job, subscribe: (given) => { listener = given; return () => undefined } })
  list.start()
  void listener.onSync()
  await settled()
  hangs = false
  listener.onSync()
  for (let i = 0; i < 40; i++) { mock.timers.tick(1000); await settled() }
  assert.equal(queries.getQueryData(['jobs'])?.[0]?.job_id, 'a')
  mock.timers.reset()
  queries.clear()
})

test('on a server, hooks render what they are given and ask for nothing', () => {
  const client = new Client()
  const builder = { url: new URL('http://x/assets?select=id,created_at,tags'), schema: 'public', then() { throw new Error('fetched') } }
  const row = { id: 'a', created_at: '2026-11-29', tagging_stage: 'queued', tags: null }
  function Page() {
    const { rows } = useAssets({ query: () => builder, initialRows: [row] })
    const { status, jobs } = useTagging()
    const { job } = useJob(null)
    return createElement('p', null, `${describeStage(rows[0]).text}, ${status}, ${jobs.length}, ${job}`)
  }
  const page = createElement(AutotagProvider, { supabase: client, workspaceId: 'w' }, createElement(Page))
  const html = renderToString(createElement(QueryClientProvider, { client: new QueryClient() }, page))
  assert.equal(html, '<p>Queued for tagging, connecting, 0, undefined</p>')
  assert.deepEqual(client.order, [])
})

test('two clients of supabase-js with two users share a cache, and neither sees what the other has fetched', () => {
  const cache = new QueryClient()
  const builder = { url: new URL('http://x/assets?select=id,created_at,tags'), schema: 'public' }
  function Page() {
    const { rows } = useAssets({ query: () => builder })
    const { jobs } = useTagging()
    const { job } = useJob('j')
    return createElement('p', null, `${rows.length} rows, ${jobs.length} uploads, ${job ? 'one' : 'none'}`)
  }
  const shown = (supabase) => renderToString(createElement(QueryClientProvider, { client: cache },
    createElement(AutotagProvider, { supabase, workspaceId: 'w' }, createElement(Page))))
  const [ann, ben] = [new Client(), new Client()]
  assert.equal(shown(ann), '<p>0 rows, 0 uploads, none</p>')
  for (const { queryKey } of cache.getQueryCache().getAll()) cache.setQueryData(queryKey, { assets: { rows: [{ id: 'a' }] }, jobs: [{}], job: {} }[queryKey[3]])
  assert.equal(shown(ann), '<p>1 rows, 1 uploads, one</p>')
  assert.equal(shown(ben), '<p>0 rows, 0 uploads, none</p>')
  cache.clear()
})

test('calls need no channel, and one client has one channel for each workspace', async () => {
  const client = new Client()
  client.rpc = async (name, args) => ({ data: { name, args }, error: null, status: 200 })
  const [one, two] = [createAutotag(client, { workspaceId: 7 }), createAutotag(client, { workspaceId: 7 })]
  assert.deepEqual(await one.jobs({ before: new Date(0) }), {
    name: 'tagging_jobs', args: { workspace_id: 7, only_live: false, limit: 50, before: '1970-01-01T00:00:00.000Z' },
  })
  const stops = [one.subscribe({}), two.subscribe({})]
  await settled()
  assert.equal(client.channels.length, 1)
  for (const stop of stops) stop()
})
