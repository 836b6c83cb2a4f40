import type { QueryClient, QueryKey } from '@tanstack/react-query'
import { AutotagError } from '../errors.js'
import type { Autotag } from '../index.js'
import type { Job, JobComplete, JobProgress } from '../types.js'
import { fetchingAnew } from './shared.js'

const MAX_UPLOADS = 100 // of a list; the server lists as many at once
const RECENT = 20 // newest uploads that a load requests, to find missed ones
const MAX_REQUESTS = 4 // at once

/** An upload as messages describe it. The other fields exist once it was fetched. */
export type LiveJob = Pick<Job, 'job_id' | 'image_count' | 'completed' | 'failed' | 'progress' | 'eta'> & Partial<Job>
type Change = Partial<LiveJob>

/** What a message says about an upload. */
function changeOf(message: JobProgress | JobComplete): Change & { job_id: string } {
  const { job_id, completed, failed, image_count, status } = message
  const rest = 'progress' in message ? { progress: message.progress, eta: message.eta } : { progress: 100, eta: null }
  return { job_id, completed, failed, image_count, ...status && { status, cancelled: status.startsWith('cancel') }, ...rest }
}

const RANKS: Record<string, number> = { cancelling: 1, completed: 2, cancelled: 2 }

/** The progress of an upload, as numbers that compare in this order. In the database, it never decreases. */
function reached({ finished_at, completed = 0, failed = 0, status, progress = 0 }: Change): number[] {
  return [finished_at ? 1 : 0, completed + failed, RANKS[status ?? ''] ?? 0, progress]
}

/** Merges new information about an upload. Messages and answers may arrive out of order: more progress wins, then the later arrival. */
function merged<J extends Change>(known: J, more: Change): J {
  const [mine, other] = [reached(known), reached(more)]
  const at = mine.findIndex((value, i) => value !== other[i])
  return at >= 0 && mine[at]! > other[at]! ? { ...more, ...known } : { ...known, ...more }
}

/** Merges a message. It does not change an upload whose end is known, because only the database knows the time of the end. */
function withMessage<J extends Change>(known: J, message: Change | undefined): J {
  return !message ? known : known.finished_at ? { ...message, ...known } : merged(known, message)
}

/** Whether the database has reported that the upload has ended. */
const isSettled = (job: LiveJob): boolean => Boolean(job.finished_at && job.created_at)

/** The newest uploads. Ended ones are dropped first. */
function bounded(jobs: LiveJob[]): LiveJob[] {
  while (jobs.length > MAX_UPLOADS) {
    const ended = jobs.findLastIndex((job) => job.finished_at)
    jobs.splice(ended < 0 ? MAX_UPLOADS : ended, 1)
  }
  return jobs
}

/** Uploads that this page has started but not yet fetched have no `created_at`. */
function newestFirst(jobs: LiveJob[]): LiveJob[] {
  const made = (job: LiveJob): number => job.created_at ? Date.parse(job.created_at) : Infinity
  return jobs.sort((a, b) => made(a) === made(b) ? 0 : made(b) - made(a))
}

/** A workspace's unfinished uploads, and those that have ended since. */
export class JobList {
  readonly #client: QueryClient
  readonly #queryKey: QueryKey
  readonly #autotag: Autotag
  readonly #changes = new Map<string, Change>() // since the last load began
  #since: number | null = null // start of the newest upload that is older than this list; in the server's time
  #userChanges = 0
  #stop: (() => void) | null = null
  readonly refresh: () => Promise<void>

  constructor(client: QueryClient, queryKey: QueryKey, autotag: Autotag) {
    this.#client = client
    this.#queryKey = queryKey
    this.#autotag = autotag
    this.refresh = fetchingAnew(client, queryKey, () => this.load())
  }

  start(): void {
    this.#stop = this.#autotag.subscribe({
      onProgress: (message) => this.patch(changeOf(message)),
      onJobComplete: (message) => this.patch({ ...changeOf(message), finished_at: new Date().toISOString() }),
      onSync: () => { void this.refresh() },
      onUserChange: () => {
        this.#userChanges++
        this.#changes.clear()
        this.#since = null
        this.#client.setQueryData(this.#queryKey, [])
        setTimeout(() => { if (this.#stop && this.#autotag.status !== 'signed-out') void this.refresh() }) // even if no channel is joined
      },
    })
  }

  stop(): void {
    this.#stop?.()
    this.#stop = null
  }

  get #shown(): LiveJob[] { return this.#client.getQueryData<LiveJob[]>(this.#queryKey) ?? [] }

  async load(): Promise<LiveJob[]> {
    this.#changes.clear()
    const userChanges = this.#userChanges
    try {
      const fetched = await this.#fetch(userChanges)
      if (userChanges !== this.#userChanges) return await this.load() // these belong to the former user
      const shown = this.#shown.filter((job) => fetched.has(job.job_id) || this.#changes.has(job.job_id) || isSettled(job))
      const all = new Map(shown.map((job) => [job.job_id, job]))
      for (const [id, job] of fetched) all.set(id, withMessage(merged(all.get(id) ?? job, job), this.#changes.get(id)))
      setTimeout(() => { if (this.#stop) for (const change of this.#changes.values()) this.#show(change) }) // it may have arrived before TanStack Query has stored this
      return bounded(newestFirst([...all.values()]))
    } catch (error) {
      if (error instanceof AutotagError && error.code === 'PGRST202') return this.#shown // an older server has no tagging_jobs
      throw error
    }
  }

  /** The unfinished uploads, the newest ones that began after this list, and shown ones that may have ended. */
  async #fetch(userChanges: number): Promise<Map<string, LiveJob>> {
    const unsettled = this.#shown.filter((job) => !isSettled(job)).length
    const [live, recent] = await Promise.all([
      this.#autotag.jobs({ onlyLive: true, limit: MAX_UPLOADS }),
      this.#autotag.jobs({ limit: Math.min(Math.max(unsettled, this.#since === null ? 1 : RECENT), MAX_UPLOADS) }),
    ])
    const fetched = new Map<string, LiveJob>(live.map((job) => [job.job_id, job]))
    if (userChanges !== this.#userChanges) return fetched
    this.#since ??= recent[0] ? Date.parse(recent[0].created_at) : -Infinity
    const shown = new Set(this.#shown.map((job) => job.job_id))
    for (const job of recent) {
      const known = fetched.get(job.job_id)
      if (known || shown.has(job.job_id) || Date.parse(job.created_at) > this.#since) fetched.set(job.job_id, known ? merged(known, job) : job)
    }
    const missing = this.#shown.filter((job) => !fetched.has(job.job_id) && !this.#changes.has(job.job_id) && !isSettled(job))
    await Promise.all(Array.from({ length: MAX_REQUESTS }, async () => {
      for (let next; (next = missing.shift()) && userChanges === this.#userChanges;) {
        const job = await this.#autotag.job(next.job_id).catch((error: unknown) => {
          if (error instanceof AutotagError && error.code === 'unknown_job') return null
          throw error
        })
        if (job) fetched.set(job.job_id, job)
      }
    }))
    return fetched
  }

  patch(change: Change & { job_id: string }): void {
    const before = this.#changes.get(change.job_id)
    this.#changes.delete(change.job_id)
    this.#changes.set(change.job_id, before ? withMessage(before, change) : change)
    if (this.#changes.size > MAX_UPLOADS) this.#changes.delete(this.#changes.keys().next().value!)
    this.#show(change)
  }

  #show(change: Change): void {
    this.#client.setQueryData<LiveJob[]>(this.#queryKey, (jobs = []) => {
      const at = jobs.findIndex((job) => job.job_id === change.job_id)
      if (at >= 0) return jobs.map((job, i) => i === at ? withMessage(job, change) : job)
      return bounded([{ job_id: change.job_id!, image_count: 0, completed: 0, failed: 0, progress: 0, eta: null, ...change }, ...jobs])
    })
  }
}

/** One upload; null: none. */
export class OneJob {
  readonly #client: QueryClient
  readonly #queryKey: QueryKey
  readonly #autotag: Autotag
  readonly #jobId: string | null
  #change: Change | undefined // since the last load began
  #userChanges = 0
  #stop: (() => void) | null = null
  readonly refresh: () => Promise<void>

  constructor(client: QueryClient, queryKey: QueryKey, autotag: Autotag, jobId: string | null) {
    this.#client = client
    this.#queryKey = queryKey
    this.#autotag = autotag
    this.#jobId = jobId
    this.refresh = fetchingAnew(client, queryKey, () => this.load())
  }

  async load(): Promise<Job> {
    this.#change = undefined
    const userChanges = this.#userChanges
    const job = await this.#autotag.job(this.#jobId!)
    if (userChanges !== this.#userChanges) return job // do not store it: it belongs to the former user
    const known = this.#client.getQueryData<Job>(this.#queryKey)
    setTimeout(() => { if (this.#change) this.#show(this.#change) }) // it may have arrived before TanStack Query has stored this
    return withMessage(merged(known ?? job, job), this.#change)
  }

  start(): void {
    if (this.#jobId === null) return
    this.#stop = this.#autotag.subscribe({
      onProgress: (message) => { if (message.job_id === this.#jobId) this.#patch(changeOf(message)) },
      onJobComplete: (message) => {
        if (message.job_id !== this.#jobId) return
        this.#patch(changeOf(message))
        void this.refresh()
      },
      onSync: () => { if (!this.#client.getQueryData<Job>(this.#queryKey)?.finished_at) void this.refresh() },
      onUserChange: () => {
        this.#userChanges++
        this.#change = undefined
        void this.#client.resetQueries({ queryKey: this.#queryKey, exact: true })
      },
    })
  }

  stop(): void { this.#stop?.() }

  #patch(change: Change): void {
    this.#change = this.#change ? withMessage(this.#change, change) : change
    this.#show(change)
  }

  #show(change: Change): void { this.#client.setQueryData<Job>(this.#queryKey, (job) => job && withMessage(job, change)) }
}
