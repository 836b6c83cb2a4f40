// Your project's URL and publishable key.
export const url = 'https://your-project.supabase.co'
export const key = 'sb_publishable_…'
